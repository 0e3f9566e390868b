"""How fast, measured against what people would use instead; run by hand, never imported by the product."""
