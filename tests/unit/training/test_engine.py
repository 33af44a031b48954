"""One trainable under ZeRO-2 on one rank: equal to plain AdamW, and exact about what was applied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError, RequeueRequest
from sdtrain.training.ema import decay_at
from sdtrain.training.engine import DTYPES, Engine, EngineSettings, StepResult, parameter_groups
from sdtrain.training.health import StepLost
from tests.engines import fp16_on_cpu, one_rank

BATCH, RATE = 4, 1e-2


# Without DeepSpeed ----------------------------------------------------------------------------------------------------


def test_deepspeed_is_told_the_whole_batch() -> None:
    page = EngineSettings(micro_batch_size=4, grad_accum_steps=3, gradient_clip_norm=None).deepspeed_config(8)
    assert page["train_batch_size"] == 96
    assert (page["train_micro_batch_size_per_gpu"], page["gradient_accumulation_steps"]) == (4, 3)
    assert page["gradient_clipping"] == 0.0


@pytest.mark.parametrize(("on_gpu", "size"), [(False, 8_000_000), (True, 50_000_000)])
def test_on_a_cpu_a_bucket_is_no_larger_than_what_stays_when_it_is_freed(
    on_gpu: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    zero = EngineSettings(micro_batch_size=4, grad_accum_steps=1).deepspeed_config(1)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (size, 50_000_000)


def test_weight_decay_on_all_is_one_group() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    (group,) = parameter_groups(network, 0.1, "all")
    assert [id(one) for one in group["params"]] == [id(one) for one in network.parameters()]
    assert group["weight_decay"] == 0.1


def test_weight_decay_on_matrices_leaves_vectors_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.GroupNorm(1, 2))
    matrices, vectors = parameter_groups(network, 0.1, "matrices")
    assert [id(one) for one in matrices["params"]] == [id(network[0].weight)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert len(vectors["params"]) == 3


def test_groups_leave_out_what_is_frozen_and_what_would_be_empty() -> None:
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(network, 0.1, "all")] == [1]
    assert [len(group["params"]) for group in parameter_groups(network, 0.1, "matrices")] == [1]


# With DeepSpeed -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place() -> Iterator[None]:
    with one_rank():
        yield


PRECISIONS = ["fp32", "bf16", "fp16"]


@pytest.fixture
def any_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    with fp16_on_cpu():
        yield request.param


def network(seed: int = 0, outputs: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, outputs))


def engine_of(module: nn.Module, **changes: object) -> Engine:
    values: dict[str, object] = {"micro_batch_size": BATCH, "grad_accum_steps": 1, "gradient_clip_norm": 0.05}
    return Engine(module, EngineSettings(**(values | changes)))


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, 2, generator=generator)


def losses_of(module: nn.Module, step: int) -> Tensor:
    inputs, wanted = data(step)
    return (module(inputs.to(next(module.parameters()).dtype)).float() - wanted).square().mean(1)


def update(engine: Engine, step: int, rate: float = RATE, factor: float = 1.0):
    losses = losses_of(engine.module, step) * factor
    engine.backward(losses, torch.ones(BATCH))
    result = engine.step(rate)
    assert result is not None
    return result


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in module.parameters()])


OTHER_STAGES = {
    "elastic_checkpoint", "leaf_module", "load_from_fp32_weights", "log_trace_cache_warnings",
    "memory_efficient_linear", "override_module_apply", "pipeline_loading_checkpoint", "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory", "sub_group_size", "zenflow", "prefetch_bucket_size",
    "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters", "max_reuse_distance",
    "gather_16bit_weights_on_model_save", "module_granularity_threshold", "use_all_reduce_for_fetch_params",
    "allgather_sequential", "stage3_gather_fp16_weights_on_model_save", "zero_hpz_partition_size",
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "cpu_offload", "cpu_offload_param",
    "cpu_offload_use_pin_memory", "offload_optimizer", "offload_param",
}  # fmt: skip
"""Keys of DeepSpeed's ZeRO section that mean nothing to stage 2 on the device, or to checkpoints that are ours."""


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_deepspeed_understood_every_key_that_it_is_told(precision: str) -> None:
    """A release that renames a key would ignore ours and take its own default."""
    from deepspeed.runtime.config import DeepSpeedConfig

    told = EngineSettings(
        micro_batch_size=4, grad_accum_steps=3, precision=precision, gradient_clip_norm=0.3, overlap_comm=True
    ).deepspeed_config(1)
    parsed = DeepSpeedConfig(copy.deepcopy(told))
    sections = {
        "bf16": parsed.bfloat16_config,
        "fp16": parsed.float16_config,
        "zero_optimization": parsed.zero_config,
        "comms_logger": parsed.comms_config.comms_logger,
    }
    for name, section in sections.items():
        assert {key: getattr(section, key) for key in told[name]} == told[name]
    assert {key: getattr(parsed, key) for key in told["data_types"]} == told["data_types"]
    assert parsed.torch_autocast_enabled is told["torch_autocast"]["enabled"]
    plain = {key: value for key, value in told.items() if not isinstance(value, dict)}
    plain["communication_data_type"] = DTYPES[told["communication_data_type"]]
    assert {key: getattr(parsed, key) for key in plain} == plain


@pytest.mark.engine
@pytest.mark.usefixtures("place")
def test_no_key_of_deepspeeds_that_can_change_a_number_is_left_to_its_default() -> None:
    """A key that a new release adds fails here, until somebody has decided what it shall be."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    told = EngineSettings(micro_batch_size=1, grad_accum_steps=1).deepspeed_config(1)
    assert set(told["bf16"]) == set(DeepSpeedBF16Config.model_fields)
    assert set(told["fp16"]) == set(DeepSpeedFP16Config.model_fields)
    assert set(told["zero_optimization"]) == set(DeepSpeedZeroConfig.model_fields) - OTHER_STAGES


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("reduce_precision", ["fp32", "working"])
@pytest.mark.parametrize("any_precision", PRECISIONS, indirect=True)
def test_deepspeed_built_what_it_was_told(any_precision: str, reduce_precision: str) -> None:
    settings = {"precision": any_precision, "reduce_precision": reduce_precision, "gradient_clip_norm": 0.3}
    module = network()
    module.register_buffer("table", torch.ones(3))
    engine = engine_of(module, **settings)
    working, built = DTYPES[any_precision], engine._engine.optimizer
    assert {parameter.dtype for parameter in engine.module.parameters()} == {working}
    assert {buffer.dtype for buffer in engine.module.buffers()} == {torch.float32}, "buffers stay as they are"
    assert {tensor.dtype for tensor in engine.tensors().values()} == {torch.float32}, "master, moments, EMA"
    assert built.gradient_accumulation_dtype == torch.float32
    assert built.communication_data_type == (working if reduce_precision == "working" else torch.float32)
    assert (built.partition_gradients, built.clip_grad, built.gradient_average) == (True, 0.3, True)
    assert (built.compute_grad_norm, built.reduce_scatter, built.contiguous_gradients) == (True, True, True)
    assert built.check_grad_overflow == (any_precision != "fp32")
    scaler = built.loss_scaler
    if any_precision == "fp16":
        assert type(scaler).__name__ == "DynamicLossScaler"
        assert (scaler.cur_scale, scaler.scale_window, scaler.min_scale) == (65536, 1000, 1)
        assert (scaler.delayed_shift, scaler.consecutive_hysteresis) == (2, False)
    else:
        assert (scaler.dynamic, scaler.loss_scale) == (False, 1.0)


@pytest.mark.engine
@pytest.mark.usefixtures("place")
def test_a_precision_that_the_device_does_not_have_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    with pytest.raises(ConfigError) as raised:
        engine_of(network(), precision="fp16")
    assert str(raised.value) == (
        "trainer.precision = fp16: DeepSpeed does not train in it on this device (cpu), which has fp32, bf16; set "
        "trainer.precision to one of these"
    )


@pytest.mark.engine
@pytest.mark.usefixtures("place")
def test_two_trainables_train_as_two_plain_adamws_would() -> None:
    """An autoencoder and its judge: each loss reaches the parameters of both, each update moves one."""

    def losses(coder: nn.Module, judge: nn.Module, name: str, step: int) -> Tensor:
        inputs, _ = data(step)
        made = coder(inputs)
        if name == "coder":
            return made.square().mean(1) - judge(made)[:, 0]
        return judge(made)[:, 0] - judge(inputs[:, :2])[:, 0] + made.square().mean(1)

    def judge_of() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    theirs = {"coder": network(), "judge": judge_of()}
    mine = {"coder": network(), "judge": judge_of()}
    start = {name: flat(module) for name, module in mine.items()}
    engines = {name: engine_of(module) for name, module in mine.items()}
    plain = {name: torch.optim.AdamW(parameter_groups(module, 0.01, "all"), lr=RATE) for name, module in theirs.items()}
    for step in range(12):
        for name, engine in engines.items():
            other = next(one for one in engines if one != name)
            with engine.alone([engines[other]]):
                assert not any(parameter.requires_grad for parameter in mine[other].parameters())
                engine.backward(losses(**mine, name=name, step=step), torch.ones(BATCH))
                engine.step(RATE)
            assert all(parameter.requires_grad for parameter in mine[other].parameters())
            for optimizer in plain.values():
                optimizer.zero_grad()
            losses(**theirs, name=name, step=step).mean().backward()
            nn.utils.clip_grad_norm_(theirs[name].parameters(), 0.05)
            plain[name].step()
    for name in mine:
        assert (flat(theirs[name]) - start[name]).norm() > 0.1
        assert (flat(mine[name]) - flat(theirs[name])).norm() / flat(theirs[name]).norm() < 1e-6


@pytest.mark.engine
@pytest.mark.usefixtures("place")
def test_the_others_thaw_when_a_loss_raises() -> None:
    first, second = engine_of(network()), engine_of(network(1))
    with pytest.raises(ZeroDivisionError), first.alone([second]):
        raise ZeroDivisionError
    assert all(parameter.requires_grad for parameter in second.module.parameters())


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_moves_nothing(precision: str) -> None:
    engine = engine_of(network(), precision=precision)
    good = update(engine, 0)
    assert good.applied and 0 < float(good.gradient_norm) < float("inf")
    assert good.ema_decay == decay_at(1, 0.9999)
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    for factor in (float("nan"), float("inf")):
        result = update(engine, 1, factor=factor)
        assert (result.applied, result.gradient_norm, result.ema_decay) == (False, float("inf"), None)
    assert engine.applied_steps == 1
    assert engine._engine.global_steps == 3, "DeepSpeed counts skipped steps: the reason for a counter of our own"
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.tensors().items())
    assert update(engine, 2).applied
    assert engine.applied_steps == 2
    assert not torch.equal(engine.tensors()["group0/master"], before["group0/master"])


@pytest.mark.engine
@pytest.mark.usefixtures("place")
def test_accumulation_steps_at_its_boundary_and_a_tombstone_takes_its_own_share_away() -> None:
    engine, reference = engine_of(network(), micro_batch_size=2, grad_accum_steps=2), network()
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    losses = losses_of(engine.module, 0)
    engine.backward(losses[:2], weights[:2])
    assert engine.step(RATE) is None
    engine.backward(losses_of(engine.module, 0)[2:], weights[2:])
    result = engine.step(RATE)
    (losses_of(reference, 0) * weights).sum().div(BATCH).backward()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 1e9)
    assert result is not None
    assert float(result.gradient_norm) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.engine
@pytest.mark.usefixtures("place")
def test_bf16_works_on_copies_of_an_fp32_master_and_averages_the_master() -> None:
    engine = engine_of(network(), precision="bf16", ema_decay=0.9)
    (expected,) = [master.double() for master in engine.partitions.masters()]
    assert torch.equal(expected.float(), flat(network())), "the master starts from the weights, not from their rounding"
    for step in range(1, 21):
        update(engine, step, rate=1e-4)
        (master,) = engine.partitions.masters()
        assert master.dtype == torch.float32
        decay = decay_at(step, 0.9)
        expected = decay * expected + (1 - decay) * master.double()
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.bfloat16}
    assert torch.equal(flat(engine.module), master.bfloat16().float())
    assert not torch.equal(flat(engine.module), master), "the master must hold what bf16 cannot"
    (average,) = engine.ema.shards
    assert average.dtype == torch.float32
    assert (average - expected).norm() / expected.norm() < 1e-6


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluating_on_the_average_leaves_no_trace(precision: str) -> None:
    engine = engine_of(network(), precision=precision, ema_decay=0.9)
    for step in range(3):
        update(engine, step)
    trained, (average,) = flat(engine.module), engine.ema.shards
    state = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    with engine.ema_weights():
        dtype = next(engine.module.parameters()).dtype
        assert torch.equal(flat(engine.module), average.to(dtype).float())
        assert not torch.equal(flat(engine.module), trained)
    assert torch.equal(flat(engine.module), trained)
    assert all(torch.equal(tensor, state[name]) for name, tensor in engine.tensors().items())


@pytest.mark.engine
@pytest.mark.usefixtures("place")
def test_without_an_average_evaluation_sees_the_weights_themselves() -> None:
    engine = engine_of(network(), ema_decay=None)
    result = update(engine, 0)
    trained = flat(engine.module)
    with engine.ema_weights():
        assert torch.equal(flat(engine.module), trained)
    assert (engine.ema, result.ema_decay) == (None, None)
    assert set(engine.tensors()) == {"group0/master", "group0/exp_avg", "group0/exp_avg_sq"}


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_restored_engine_goes_on_bit_by_bit(precision: str) -> None:
    settings = {"precision": precision, "weight_decay_on": "matrices", "ema_decay": 0.9}
    whole = engine_of(network(), **settings)
    for step in range(3):
        update(whole, step, factor=float("nan") if step == 1 else 1.0)
    saved = copy.deepcopy(whole.tensors())
    again = engine_of(network(seed=9), **settings)
    again.restore(saved, applied_steps=whole.applied_steps, scaler=whole.scaler_state())
    assert again.applied_steps == 2
    assert torch.equal(flat(again.module), flat(whole.module))
    for step in range(3, 6):
        one, other = update(whole, step), update(again, step)
        assert (float(one.gradient_norm), one.ema_decay) == (float(other.gradient_norm), other.ema_decay)
    mine, theirs = again.tensors(), whole.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.engine
@pytest.mark.usefixtures("place")
def test_only_fp16_scales_its_losses() -> None:
    for precision in ("fp32", "bf16"):
        engine = engine_of(network(), precision=precision)
        assert (engine.scaler_state(), engine.loss_scale) == ({}, 1.0)


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("any_precision", ["fp16"], indirect=True)
def test_the_fp16_loss_scale_is_part_of_the_state(any_precision: str) -> None:
    """Two overflows halve the scale once (the first is forgiven); it grows again after so many good steps."""

    def engine_with_short_window(seed: int = 0) -> Engine:
        engine = engine_of(network(seed), precision=any_precision, ema_decay=0.9)
        engine._engine.optimizer.loss_scaler.scale_window = 4
        return engine

    def go(engine: Engine, steps: range) -> list[tuple[float, float]]:
        results = [update(engine, step, factor=1e30 if step in (1, 2, 4) else 0.1) for step in steps]
        return [(float(result.gradient_norm), result.loss_scale) for result in results]

    whole, again = engine_with_short_window(), engine_with_short_window(seed=9)
    assert [scale for _, scale in go(whole, range(6))] == [2.0**16] * 3 + [2.0**15] * 2 + [2.0**14]
    state = whole.scaler_state()
    assert whole.applied_steps == 3, "an overflow is no step"
    assert state == {"cur_scale": 2.0**14, "cur_iter": 6.0, "last_overflow_iter": 4.0, "cur_hysteresis": 1.0}
    again.restore(copy.deepcopy(whole.tensors()), applied_steps=whole.applied_steps, scaler=state)
    assert again.scaler_state() == state
    assert type(again._engine.optimizer.loss_scaler.cur_iter) is int
    assert go(again, range(6, 16)) == go(whole, range(6, 16))
    assert whole.loss_scale == 2.0**16, "grown twice"
    mine, theirs = again.tensors(), whole.tensors()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# Steps that are thrown away -------------------------------------------------------------------------------------------


class Starving(torch.autograd.Function):
    """The identity, whose backward finds no memory."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: object, gradients: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def whole_step(engine: Engine, step: int, change: Callable[[Tensor], Tensor] = lambda losses: losses) -> StepResult:
    """All micro-steps, `change`d in the second one (or the only one)."""
    accumulation = engine.settings.grad_accum_steps
    engine.begin()
    try:
        for micro_step in range(accumulation):
            losses = 0.1 * losses_of(engine.module, 100 * step + micro_step)  # fp16 starts with a scale of 65,536
            changed = change(losses) if micro_step == min(1, accumulation - 1) else losses
            verdict = torch.tensor(1.0) if micro_step == accumulation - 1 else None
            engine.backward(changed, torch.ones(BATCH), verdict)
    except StepLost:
        engine.discard()
    result = engine.step(RATE)
    assert result is not None
    if not result.applied:
        engine.rewind(keeps_scale=False)
    return result


def discarded_step(engine: Engine, step: int) -> StepResult:
    """A forward without memory at the second micro-step (or the only one)."""
    engine.begin()
    if engine.settings.grad_accum_steps > 1:
        engine.backward(losses_of(engine.module, 100 * step), torch.ones(BATCH))
    engine.discard()
    result = engine.step(RATE)
    assert result is not None
    engine.rewind(keeps_scale=False)
    return result


def state_of(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.tensors().items()} | {"weights": flat(engine.module)}


class Centred(nn.Module):
    """Takes the running mean away: a forward that leaves something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(7))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean.lerp_(inputs.detach().mean(0).to(self.mean), 0.1)
        return inputs - self.mean.to(inputs)


def centred() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), Centred(), nn.GELU(), nn.Linear(7, 2))


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("oom_skip", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("any_precision", PRECISIONS, indirect=True)
def test_a_run_with_sick_steps_equals_one_that_never_saw_them(
    any_precision: str, accumulation: int, oom_skip: bool
) -> None:
    settings = {"precision": any_precision, "grad_accum_steps": accumulation, "oom_skip": oom_skip, "ema_decay": 0.9}
    sick, healthy = engine_of(centred(), **settings), engine_of(centred(), **settings)
    for step in range(5):
        assert whole_step(healthy, step).applied
        assert whole_step(sick, step).applied
        scaler = sick.scaler_state()
        refused = [
            whole_step(sick, 50, lambda losses: losses * float("nan")),
            whole_step(sick, 50, lambda losses: losses * float("inf")),
            discarded_step(sick, 50),
        ]
        if oom_skip:
            refused.append(whole_step(sick, 50, Starving.apply))
        assert {result.applied for result in refused} == {False}
        assert sick.scaler_state() == scaler, "none of it says anything about the loss scale"
    assert sick.applied_steps == healthy.applied_steps == 5
    mine, theirs = state_of(sick), state_of(healthy)
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    assert sick.scaler_state() == healthy.scaler_state()
    assert torch.equal(sick.module[1].mean, healthy.module[1].mean)
    assert sick.module[1].mean.abs().max() > 0


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("any_precision", PRECISIONS, indirect=True)
def test_reducing_after_the_backward_changes_no_bit(any_precision: str, accumulation: int) -> None:
    """Half precision must go on adding up in fp32; the gradients' own sum would be off by its rounding."""
    settings = {"precision": any_precision, "grad_accum_steps": accumulation}
    during, after = engine_of(network(), **settings), engine_of(network(), oom_skip=True, **settings)
    for step in range(4):
        assert whole_step(during, step).gradient_norm == whole_step(after, step).gradient_norm
    mine, theirs = state_of(after), state_of(during)
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("any_precision", PRECISIONS, indirect=True)
def test_a_verdict_of_one_changes_no_bit_and_nan_skips_whatever_the_gradients_are(any_precision: str) -> None:
    plain, judged = (engine_of(network(), precision=any_precision) for _ in range(2))
    for step in range(3):
        plain.begin()
        plain.backward(0.1 * losses_of(plain.module, 100 * step), torch.ones(BATCH))
        assert plain.step(RATE) == whole_step(judged, step)
    mine, theirs = state_of(judged), state_of(plain)
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    judged.begin()
    masked = losses_of(judged.module, 0).masked_fill(torch.ones(BATCH, dtype=torch.bool), float("nan"))
    judged.backward(masked, torch.ones(BATCH), torch.tensor(float("nan")))
    result = judged.step(RATE)
    assert result is not None and not result.applied, "such a loss has gradients of 0, which are finite"


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_large_finite_gradients_are_clipped_and_applied(precision: str) -> None:
    engine = engine_of(network(), precision=precision)
    before, usual = flat(engine.module), whole_step(engine_of(network(), precision=precision), 0)
    result = whole_step(engine, 0, lambda losses: losses * 1e4)
    assert result.applied
    assert float(result.gradient_norm) == pytest.approx(1e4 * float(usual.gradient_norm), rel=1e-2)
    assert 0 < (flat(engine.module) - before).abs().max() < 2 * RATE, "no further than AdamW's first step goes"


@pytest.mark.engine
@pytest.mark.usefixtures("place")
def test_without_oom_skip_a_backward_without_memory_asks_to_be_started_again() -> None:
    engine = engine_of(network())
    engine.begin()
    with pytest.raises(RequeueRequest) as raised:
        engine.backward(Starving.apply(losses_of(engine.module, 0)), torch.ones(BATCH))
    assert raised.value.exit_code == 85
    assert str(raised.value) == (
        "out of memory in a backward: CUDA out of memory. Tried to allocate 2 GiB\n"
        "The other ranks wait for this rank's gradients, so the step cannot be thrown away; started again, the run "
        "goes on from its last checkpoint. trainer.oom_skip: true skips such steps; a smaller data.micro_batch_size or "
        "trainer.gradient_checkpointing: blocks needs less memory."
    )


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("oom_skip", [False, True])
def test_an_error_in_the_backward_that_is_not_about_memory_is_raised_as_it_is(oom_skip: bool) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: object, gradients: Tensor) -> Tensor:
            raise ZeroDivisionError("in a backward")

    engine = engine_of(network(), oom_skip=oom_skip)
    engine.begin()
    with pytest.raises(ZeroDivisionError, match="in a backward"):
        engine.backward(Broken.apply(losses_of(engine.module, 0)), torch.ones(BATCH))


@pytest.mark.engine
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("any_precision", ["fp16"], indirect=True)
def test_overflowing_gradients_lower_the_loss_scale_down_to_its_least_without_raising(any_precision: str) -> None:
    engine = engine_of(network(), precision=any_precision)
    scales = [engine.loss_scale]
    for step in range(20):
        engine.begin()
        engine.backward(losses_of(engine.module, step) * 1e30, torch.ones(BATCH))
        result = engine.step(RATE)
        assert result is not None and not result.applied
        engine.rewind(keeps_scale=True)
        scales.append(engine.loss_scale)
    assert scales[:4] == [2.0**16, 2.0**16, 2.0**15, 2.0**14], "the first one is forgiven"
    assert scales[-1] == 1.0
    assert engine.applied_steps == 0
