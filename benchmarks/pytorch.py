"""PyTorch in a race: the trainer of transformers, or a loop with all that makes PyTorch fast.

    python -m benchmarks.pytorch FOLDER STEPS trainer|loop eager|compile float32|bfloat16

The loop: fused AdamW, scaled-dot-product attention, the vocabulary head at the masked places alone, torch.compile,
autocast to bfloat16. The trainer is used as its documentation shows it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn import functional  # noqa: E402

from benchmarks.contender import report  # noqa: E402
from benchmarks.work import WEIGHTS, Work, read  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS, EPSILON, CLIP = (0.9, 0.98), 1e-6, 1.0


def main(folder: str, steps: str, who: str, mode: str, dtype: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    work, arrays = read(Path(folder))
    kind = transformers.AutoModelForMaskedLM if work.objective == "masked_lm" else transformers.AutoModelForCausalLM
    model: Any = kind.from_pretrained(Path(folder, WEIGHTS), attn_implementation="sdpa")
    model.train().to(DEVICE)
    run = trained if who == "trainer" else looped
    losses, ends = run(model, work, arrays, int(steps), mode == "compile", dtype == "bfloat16")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    report(BEGAN, losses, ends, versions)


def trained(model: Any, work: Work, arrays: dict, steps: int, compiled: bool, half: bool) -> tuple[list, list]:
    """`transformers.Trainer`: labels at every place, -100 where nothing is predicted."""
    ids = torch.from_numpy(arrays["input_ids"][:steps].reshape(-1, work.length)).long()
    labels = ids.clone()
    # The trainer divides by all labels, also by the first, which nothing predicts.
    labels[:, 0] = -100
    if work.objective == "masked_lm":
        places = torch.from_numpy(arrays["masked_positions"][:steps].reshape(len(ids), -1)).long()
        right = torch.from_numpy(arrays["labels"][:steps].reshape(len(ids), -1)).long()
        labels = torch.full_like(ids, -100).scatter(1, places, right)
    rows: Any = [{"input_ids": one, "labels": label} for one, label in zip(ids, labels, strict=True)]
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *arguments, **named):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *arguments):
            return torch.utils.data.SequentialSampler(rows)

    settings = transformers.TrainingArguments(
        output_dir="trainer",
        per_device_train_batch_size=work.rows,
        max_steps=steps,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=work.weight_decay,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        bf16=half,
        torch_compile=compiled,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=DEVICE == "cuda",
    )
    trainer = InOrder(model, settings, train_dataset=rows, callbacks=[Clock()])
    # It prints what it logs.
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], ends


def looped(model: Any, work: Work, arrays: dict, steps: int, compiled: bool, half: bool) -> tuple[list, list]:
    """A loop of few lines in which nothing waits."""
    optimizer = torch.optim.AdamW(
        _groups(model, work.weight_decay), lr=work.learning_rate, betas=BETAS, eps=EPSILON, fused=True
    )
    parameters = list(model.parameters())

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            return loss_of(model, work, batch)

    step_loss: Callable[[Any], torch.Tensor] = torch.compile(forward) if compiled else forward
    losses, ends = [], []
    for batch in batches(arrays, steps):
        loss = step_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return [loss.item() for loss in losses], ends


def loss_of(model: Any, work: Work, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of what is predicted, with the head where it is needed."""
    if work.objective == "masked_lm":
        x_BTD = model.bert(input_ids=batch["input_ids"]).last_hidden_state
        places = batch["masked_positions"][:, :, None].expand(-1, -1, x_BTD.shape[-1])
        scores = model.cls(x_BTD.gather(1, places))
        return functional.cross_entropy(scores.flatten(0, 1).float(), batch["labels"].flatten())
    x_BTD = model.transformer(input_ids=batch["input_ids"]).last_hidden_state
    scores = model.lm_head(x_BTD[:, :-1])
    return functional.cross_entropy(scores.flatten(0, 1).float(), batch["labels"][:, :-1].flatten())


def batches(arrays: dict[str, np.ndarray], steps: int) -> Iterator[dict[str, torch.Tensor]]:
    for number in range(steps):
        yield {name: torch.from_numpy(array[number]).long().to(DEVICE) for name, array in arrays.items()}


def _groups(model: torch.nn.Module, decay: float) -> list[dict[str, Any]]:
    """Biases, norms and embeddings do not decay, as in ours."""
    free: set[torch.nn.Parameter] = set()
    for module in model.modules():
        whole = isinstance(module, (torch.nn.Embedding, torch.nn.LayerNorm))
        free |= {p for name, p in module.named_parameters(recurse=False) if whole or name == "bias"}
    return [
        {"params": [p for p in model.parameters() if p in free], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p not in free], "weight_decay": decay},
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
