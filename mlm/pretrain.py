"""Pretrain an encoder by masked LM: `python -m mlm.pretrain PRESET [flags]`.

What it learns is in mlm/record.py, how any run goes in espalier/assembly.py.
"""

from __future__ import annotations

from espalier import cli
from mlm.config import PretrainConfig
from mlm.presets import PRESETS
from sharding.processes.coordination import joined


@joined
def main(config: PretrainConfig, call: cli.Call = cli.FROM_PYTHON) -> dict:
    """Run, or resume, the pretraining that `config` describes; returns the `--json` object.

    With config.init_from, the architecture is that of the weights, but for the model settings given in `call`.
    """
    call.greet()
    from espalier.assembly import train

    return train(config, call=call)


if __name__ == "__main__":
    cli.run(main, PRESETS, prog="mlm", description="Pretrain an encoder by masked LM.")
