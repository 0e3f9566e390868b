"""Fine-tune a pretrained model on labelled data: `python -m finetune.train PRESET --init-from RUN [flags]`.

What can be learnt is in finetune/tasks, how any run goes in espalier/assembly.py.
"""

from __future__ import annotations

from espalier import cli
from finetune.config import FinetuneConfig
from finetune.glue.record import GlueConfig
from finetune.presets import PRESETS
from sharding.processes.coordination import joined


@joined
def main(config: FinetuneConfig, call: cli.Call = cli.FROM_PYTHON) -> dict:
    """Run, or resume, the fine-tuning that `config` describes; returns the `--json` object."""
    call.greet()
    if isinstance(config, GlueConfig):
        from finetune.glue.run import run

        return run(config, call.settings_of("optimizer"))
    from espalier.assembly import train

    return train(config, call=call)


if __name__ == "__main__":
    cli.run(main, PRESETS, prog="finetune", description="Fine-tune a pretrained model on labelled data.")
