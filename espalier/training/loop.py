"""The training loop, from the first parameter to the last checkpoint. Read it top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from espalier import progress
from espalier.contracts import Origin
from espalier.trackers.notify import Notifier
from espalier.training.bad_steps import SkippedSteps
from espalier.training.best import KeptBest
from espalier.training.checkpoint import Checkpoints
from espalier.training.checksums import ChecksumLog
from espalier.training.collected import Added, Collector
from espalier.training.config import TrainConfig
from espalier.training.evaluation import make_evaluate
from espalier.training.fallback import resumed_step
from espalier.training.guard import StopSignal
from espalier.training.introduction import introduce
from espalier.training.manifest import complete_steps
from espalier.training.optimizer import Optimizer, build_optimizer, schedule
from espalier.training.profile import Profile
from espalier.training.run import Result, RunDirectory
from espalier.training.sparsity import Projection, projection
from espalier.training.start import Beginning, RunOrigin, beginning, check_fork, first_state, keep_frozen
from espalier.training.state import TrainState
from espalier.training.step import count_tokens, jit_train_step
from espalier.training.tracker import Tracker
from espalier.training.trainable import Trainable
from sharding.mesh import place_batch
from sharding.processes.coordination import from_first
from sharding.topology import peak_flops


def train(
    config: TrainConfig,
    task: Trainable,
    run: RunDirectory,
    mesh: Mesh,
    config_dict: dict,
    origin: Origin | None = None,
    notify: Notifier | None = None,
) -> Result:
    """Train from the origin until config.steps, stop_at or a signal. What can be refused is refused before any write.

    config_dict: JSON values, saved with each checkpoint. origin: what the run goes on from; None = nothing.
    notify: the webhook that is told of it.
    """
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        optimizer, factor, project = optimization(config, task)
        check_fork(config, origin, config_dict.get("fingerprints", {}))
        begun = beginning(origin, task.load_params)
        start = begun.step
        last = min(config.stop_at or config.steps, config.steps)
        profile = Profile(config.profile, run.profile, start, last, progress.say)
        stack.callback(profile.close)
        introduce(task.about, config, mesh, begun.words, start, last, task.tokens_per_step)
        with progress.waiting("making the first state" if origin is None else "loading the first state"):
            state = jax.block_until_ready(
                first_state(config, task.init_params, optimizer, mesh, origin, task.load_params, task.frozen)
            )
        deviations = config.bad_steps.deviations
        train_step = jit_train_step(task.objective, optimizer, factor, config.accumulation, state, project, deviations)
        evaluate = make_evaluate(task.objective, task.eval_batches, mesh, task.finalize_eval, config.accumulation)

        stack.enter_context(run.writing(config_dict, start))
        task.save_tokenizer(run.tokenizer)
        kept = {"frozen": keep_frozen(run, state.frozen, task.frozen, origin)} if task.frozen else {}
        objective = task.objective
        collector = Collector(
            objective.collect, run.collected, mesh, steps=objective.collected_for, ahead=objective.ahead
        )

        def tokens_of(begun: Beginning) -> int:
            return begun.step * task.tokens_per_step if begun.tokens is None else begun.tokens

        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(run.checkpoints, config.checkpoint)))
        peak = peak_flops(mesh.devices.flat[0])
        tracker = Tracker(
            run,
            total_steps=config.steps,
            start_step=start,
            last_step=last,
            tokens=tokens_of(begun),
            flops_per_step=task.flops_per_step,
            peak_flops=peak and peak * mesh.size,
            log_every=config.log_every,
            quiet=jax.process_index() != 0,
            interval=begun.interval,
            trackers=config.trackers,
            config=config_dict,
            notify=notify,
        )
        stack.enter_context(tracker)
        checkpoints.announce = tracker.say
        best = KeptBest.of(config, run, tracker, checkpoints)
        checksums = stack.enter_context(
            ChecksumLog(
                run,
                config.checksum_every,
                mesh,
                state,
                settings=config_dict,
                log_every=config.log_every,
                say=tracker.say,
            )
        )
        first = jax.process_index() == 0
        bad = SkippedSteps(config.bad_steps, run.skipped, start, begun.skipped, tracker.say, task.documents, first)
        batches = stack.enter_context(contextlib.closing(task.batches_from(bad.batch(start))))
        stop = stack.enter_context(StopSignal())
        # A collection in the middle of a step stalls every device of the mesh.
        gc.disable()
        stack.callback(gc.enable)

        def save(state: TrainState, step: int, last: bool) -> None:
            with tracker.saving():
                data = kept | tracker.carried | bad.carried | {"step": step}
                checkpoints.save(state, config_dict, data, waited_for=last)
            collector.forget(bad.batch(min(complete_steps(run.checkpoints), default=0)))

        def evaluated(state: TrainState, step: int) -> dict[str, float] | None:
            """None where a signal ended it; the next session makes up for it."""
            with tracker.paused():
                metrics = evaluate(state, stop.reached)
                gc.collect()
            if metrics is None:
                return None
            tracker.evaluation(step, metrics)
            if best:
                best.evaluated(step, metrics)
            return metrics

        def last_saved() -> tuple[TrainState, Beginning]:
            """What the newest checkpoint holds, or, before the first, what the run began with."""
            checkpoints.wait()
            saved = resumed_step(run)
            there = origin if saved is None else RunOrigin(run.path, saved, config_dict, resumed=True)
            with progress.waiting("loading the last checkpoint"):
                state = first_state(config, task.init_params, optimizer, mesh, there, task.load_params, task.frozen)
            health = state.health | {"bad_in_a_row": state.health["bad_in_a_row"] * 0}
            return jax.block_until_ready(dataclasses.replace(state, health=health)), beginning(there, task.load_params)

        step, loss, evaluation, pending = start, None, {}, None
        # No checkpoint is written while steps are bad, so that the last one is from before; what is due waits.
        due: set[str] = set()
        if start >= last:
            tracker.say(f"nothing left to train: step {start} of {config.steps} is done")
        # An evaluation that the end of the last session left out.
        known = from_first("evaluated", tracker.has_evaluation(start))
        if start >= last or start and start % config.eval_every == 0 and not known:
            evaluation = evaluated(state, start)
        while step < last and evaluation is not None and not (best and best.exhausted):
            with tracker.waiting():
                batch = next(batches)
            with profile.step(step + 1), tracker.compiling(batch):
                batch, added = collector(state, place_batch(batch, mesh), bad.batch(step))
                counted = count_tokens(batch)
                state, metrics = train_step(state, batch)
            step += 1
            checksums.after(state, step)
            profile.after(state, step)
            # The device works on this step while the host reads the one before.
            if pending is not None:
                loss = _report(tracker, checkpoints, collector, bad, pending, loss)
            pending = step, metrics, counted, added

            stopping = stop.reached()
            ending = stopping or step == last
            if step % config.eval_every == 0:
                due |= {"evaluation", "save"} if best else {"evaluation"}
            if step % config.checkpoint.every == 0:
                due |= {"save"}
            if (due or ending) and (stopping or not bad.too_many):
                loss = _report(tracker, checkpoints, collector, bad, pending, loss)
                pending = None
            if bad.too_many and not stopping:
                batches.close()
                del state, metrics
                state, begun = last_saved()
                tracker.tell("rolled back", bad.go_back(begun.step, begun.skipped), step=begun.step)
                step, pending, due = begun.step, None, set()
                tracker.begin(step, tokens_of(begun), begun.interval)
                checksums.begin(state)
                best = KeptBest.of(config, run, tracker, checkpoints)
                batches = stack.enter_context(contextlib.closing(task.batches_from(bad.batch(step))))
                continue
            evaluating = step == last or "evaluation" in due and not stopping and not bad.in_a_row
            saving = ending or "save" in due and not bad.in_a_row
            if saving:
                # First, for it is written while the evaluation runs, and is there should that need too much memory.
                save(state, step, last=ending)
            if evaluating:
                evaluation = evaluated(state, step)
                if evaluation is None and not saving:
                    save(state, step, last=True)
            if ending or evaluation is None:
                break
            due = due if bad.in_a_row else set()

        with tracker.saving():
            checkpoints.finish()
        found = best.best.record if best else None
        exhausted = best is not None and best.exhausted
        if best and found:
            state, evaluation = best.given(state, step), dict(best.best.metrics)
        if step < config.steps and not exhausted:
            change = " without --stop-at" if step == last else ""
            tracker.say(f"paused at step {step} of {config.steps}, saved; the same command{change} goes on from here")
        return Result(
            state=state,
            step=step,
            finished=step == config.steps or exhausted,
            loss=loss,
            eval=evaluation or {},
            tokens=tracker.tokens,
            tokens_per_second=tracker.tokens_per_second,
            first_step_seconds=tracker.first_step_seconds,
            seconds=time.perf_counter() - began if step > start else None,
            mfu=tracker.mfu,
            data_wait=tracker.data_wait,
            stopped_by=stop.number(),
            skipped_batches=bad.batches,
            best=found,
        )


def optimization(config: TrainConfig, task: Trainable) -> tuple[Optimizer, Callable, Projection | None]:
    """(optimizer, step → factor on its rates, what is kept of the parameters after each step)."""
    shapes = jax.eval_shape(task.init_params, jax.random.key(0))
    base = jax.eval_shape(task.frozen.init, jax.random.key(0)) if task.frozen else {}
    depths = task.depths(shapes) if task.depths else None
    matrices = task.matrix_axes(shapes)
    optimizer = build_optimizer(config.optimizer, shapes, matrices, base, depths)
    project = projection(config.optimizer.sparsity, shapes, matrices, config.steps)
    return optimizer, schedule(config.optimizer, config.steps), project


def _report(
    tracker: Tracker,
    checkpoints: Checkpoints,
    collector: Collector,
    bad: SkippedSteps,
    pending: tuple[int, dict, jax.Array, Added],
    loss: float | None,
) -> float | None:
    """Wait for the metrics of a step and log them; raises where training cannot go on. Returns the loss: after a bad
    step, still the one before."""
    step, metrics, tokens, added = pending
    values = {name: float(value) for name, value in metrics.items()}
    checkpoints.check()
    collector.write(bad.batch(step - 1), added)
    skipped = bad.saw(step, values)
    tracker.log(step, values, int(tokens), skipped)
    return loss if skipped else values["loss"]
