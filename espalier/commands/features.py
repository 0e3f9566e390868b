"""Train a sparse autoencoder on a model's stream: `./launch.sh features encoder|decoder --init-from RUN …`.

What it learns is in espalier/features/objective.py, how any run goes in espalier/assembly.py.
"""

from __future__ import annotations

from espalier import cli
from espalier.features.config import PRESETS, DecoderConfig, EncoderConfig
from sharding.processes.coordination import joined


@joined
def main(config: EncoderConfig | DecoderConfig, call: cli.Call = cli.FROM_PYTHON) -> dict:
    """Run, or resume, the training that `config` describes; returns the `--json` object."""
    call.greet()
    from espalier.assembly import train

    return train(config, call=call)


if __name__ == "__main__":
    cli.run(main, PRESETS, prog="features", description="Train a sparse autoencoder on the stream of a model.")
