"""Commands that use several entry points or none: the demo, plan, report, import and export."""
