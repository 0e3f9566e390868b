"""Pretrain a decoder by causal LM: `python -m clm.pretrain PRESET [flags]`.

What it learns is in clm/record.py, how any run goes in espalier/assembly.py.
"""

from __future__ import annotations

from clm.presets import PRESETS, PretrainConfig
from espalier import cli
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
    cli.run(main, PRESETS, prog="clm", description="Pretrain a decoder by causal LM.")
