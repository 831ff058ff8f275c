"""What users have met when ranks were to be allocated, by thread: P of huggingface/peft, A of QingruZhang/AdaLoRA.

A scenario runs on both sides: unpatched PEFT shows the pain, ours doesn't. Where PEFT can't show it here, the docstring
says why.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from adalora_kernels import AdaLoraCallback, RankAllocator, SVDLinear
from adalora_kernels.integrations.peft import patch_model
from tests.integrations.small_models import (
    VOCABULARY,
    adapter_parameters,
    backward,
    batch,
    build,
    live_total,
    pattern,
    singular_values,
    train,
    twins,
)
from tests.integrations.small_models_trainer import make_trainer


def test_P1327_the_trainer_never_calls_the_allocator(tmp_path: Path) -> None:
    """The thread's settings: silence, rank_pattern None, all 24 triplets alive."""
    theirs, ours = twins(build("llama", init_r=24, target_r=4, tinit=5, tfinal=2, deltaT=1, lora_alpha=8))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*([Aa]llocat|AdaLo)")
        make_trainer(theirs, tmp_path).train()
    assert pattern(theirs) is None and all((values != 0).all() for values in singular_values(theirs).values())
    with pytest.warns(UserWarning, match=r"without a call of the rank allocator.*Missing: .*update_and_allocate"):
        make_trainer(ours, tmp_path).train()
    _, ours = twins(build("llama", init_r=24, target_r=4, tinit=5, tfinal=2, deltaT=1, lora_alpha=8))
    make_trainer(ours, tmp_path, AdaLoraCallback()).train()
    assert live_total(ours) == 4 * len(pattern(ours))


def test_P1801_ranks_look_constant(tmp_path: Path) -> None:
    """Pruned or not, shapes and ``r`` stay those of init_r; ours says what is left, and logs it."""
    theirs, ours = twins(build("llama"))
    train(theirs, 20)
    trainer = make_trainer(ours, tmp_path, AdaLoraCallback())
    trainer.train()
    for model in (theirs, ours):
        layers = [m for m in model.modules() if hasattr(m, "ranknum") and m is not model]
        assert {(layer.r["default"], len(layer.lora_E["default"])) for layer in layers} == {(6, 6)}
    assert not hasattr(theirs.base_model.rankallocator, "live_ranks")
    ranks = ours.base_model.rank_allocator().live_ranks()
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == 3 * len(ranks)
    logged = [record["adalora/live_rank"] for record in trainer.state.log_history if "loss" in record]
    assert logged[0] > logged[-1] == 3 * len(ranks)


@pytest.mark.parametrize("cure", [None, "patch_model", "RankAllocator"])
def test_P3373_no_allocator_on_a_plain_transformers_model(cure: str | None) -> None:
    """``model.add_adapter`` injects layers, and no object that has ``update_and_allocate`` is left."""
    torch.manual_seed(0)
    model = build("llama").unload()
    model.add_adapter(AdaLoraConfig(target_modules=["q_proj", "v_proj"], init_r=6, target_r=3, total_step=20))
    assert not any(hasattr(m, "update_and_allocate") for m in model.modules())
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    if cure is not None:
        patch_model(model)
    if cure == "RankAllocator":
        allocator = RankAllocator(model, 6, 3, 2, 4, 2, 0.85, 0.85, total_step=20, adapter="default")
        allocator.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(20):
            tokens = torch.randint(1, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(step))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    told = [str(w.message) for w in caught if "without a call of the rank allocator" in str(w.message)]
    assert len(told) == (cure == "patch_model") and all(
        "RankAllocator(model, ...).attach(optimizer)" in t for t in told
    )
    live = sum(int((values != 0).sum()) for values in singular_values(model).values())
    assert live == (3 if cure == "RankAllocator" else 6) * 4


@pytest.mark.parametrize("kind", ["attribute", "dict", "namedtuple"])
def test_P432_defect_2_no_orthogonality_without_a_task_type(kind: str) -> None:
    """PEFT's forward is bypassed then: its loss has no such term, and nothing says so."""
    model = get_peft_model(_Regression(kind), AdaLoraConfig(target_modules=["q"], total_step=9, orth_reg_weight=0.5))
    theirs, ours = twins(model.train())
    x = torch.randn(3, 8)
    expected, actual = (_loss_of(m(x)) for m in (theirs, ours))
    torch.testing.assert_close(expected, _loss_of(theirs.get_base_model()(x)))
    term = ours.base_model.last_orthogonality
    matrices = [
        p if "lora_A" in name else p.T for name, p in ours.named_parameters() if "lora_A" in name or "lora_B" in name
    ]
    wanted = 0.5 * sum(torch.linalg.matrix_norm(m @ m.T - torch.eye(len(m))) for m in matrices) / len(matrices)
    torch.testing.assert_close(term, wanted.detach())
    torch.testing.assert_close(actual, expected + term)
    actual.backward()
    assert ours.get_base_model().q.lora_A["default"].grad.abs().max() > 0
    torch.testing.assert_close(_loss_of(ours.eval()(x)), expected)


def test_P2337_kthvalue_out_of_range() -> None:
    """The thread's schedule, where the final phase starts before the initial one ends.

    PEFT ≥ 0.15 refuses it in the config; it still comes about where the length is set later, as for a Trainer.
    """
    with pytest.raises(ValueError, match="don't allow for a budgeting phase"):
        AdaLoraConfig(init_r=96, target_r=64, tinit=6000, tfinal=11000, deltaT=100, total_step=13500)
    theirs, ours = twins(build("llama", tinit=12, tfinal=22, deltaT=4, total_step=40))
    for model in (theirs, ours):
        model.peft_config["default"].total_step = 27
    with pytest.raises((RuntimeError, IndexError), match=r"kthvalue\(\): selected number k out of range"):
        train(theirs, 27)
    with pytest.raises(ValueError, match=r"total_step: expected more than tinit \+ tfinal = 34, got 27"):
        train(ours, 1)


def test_P2341_a_schedule_without_a_budgeting_phase_is_refused(tmp_path: Path) -> None:
    """PEFT checks its config alone: where the length is set later, it says nothing."""
    theirs, ours = twins(build("llama", tinit=12, tfinal=12, total_step=500))
    theirs.base_model.rankallocator.set_total_step(20)
    assert theirs.peft_config["default"].total_step == 20
    with pytest.raises(ValueError, match="total_step: expected more than the schedule's 12 initial and 12 final steps"):
        make_trainer(ours, tmp_path, AdaLoraCallback()).train()
    assert ours.peft_config["default"].total_step == 500


def test_P855_rank_pattern_is_none_where_the_last_ranking_was_skipped() -> None:
    """As where micro-batches or processes are counted: T - tf itself isn't among the step numbers."""
    theirs, ours = twins(build("llama", tinit=2, tfinal=4, deltaT=5, total_step=20))
    numbers = (1, 3, 7, 11, 13, 17, 19)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'keys'"):
        _steps(theirs, numbers)
    _steps(ours, numbers)
    assert live_total(ours) == 3 * len(pattern(ours))


def test_P1231_defect_8_rank_pattern_is_none_at_a_first_step_past_the_end() -> None:
    """Nothing is known of any triplet then, and nothing is pruned."""
    theirs, ours = twins(build("llama"))
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'keys'"):
        _steps(theirs, (17,))
    values = singular_values(ours)
    for step in (16, 17, 18):
        backward(ours)
        ours.base_model.update_and_allocate(step)
    assert all(torch.equal(now, values[name]) for name, now in singular_values(ours).items())


def test_P1721_defect_5_a_parameter_without_a_gradient() -> None:
    """The thread's head had one copy that no loss reaches. Later PEFTs don't adapt that; frozen branches remain."""
    theirs, ours = twins(build("llama", orth_reg_weight=0.0))
    for model in (theirs, ours):
        for layer in model.get_base_model().model.layers[1:]:
            layer.forward = lambda hidden_states, **_: hidden_states  # left out, as by layer dropping
    with pytest.raises(TypeError, match="'Parameter' and 'NoneType'"):
        train(theirs, 1)
    train(ours, 20)
    live = {name: sum(row) for name, row in pattern(ours).items()}
    dropped = [rank for name, rank in live.items() if ".layers.1." in name]
    assert dropped == [0] * 6 and sum(live.values()) == 3 * len(live)


def test_A21_a_parameter_without_a_gradient_in_the_original_package() -> None:
    """The authors' allocator, of which PEFT's is a port, multiplies by ``p.grad`` too; it is on no index."""
    torch.manual_seed(0)
    used, unused = (SVDLinear(8, 8, r=4, lora_alpha=8, merge_weights=False) for _ in range(2))
    model = nn.ModuleDict({"used": used, "unused": unused})
    nn.init.normal_(used.lora_E), nn.init.normal_(unused.lora_E)
    allocator = RankAllocator(model, 4, 2, 1, 2, 1, 0.85, 0.85, total_step=8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(8):
        used(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
        allocator.update_and_mask(model, step)
        optimizer.zero_grad()
    assert unused.lora_A.grad is None
    assert allocator.live_ranks() == {"used": 4, "unused": 0}


def _steps(model: nn.Module, numbers: tuple[int, ...]) -> None:
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    for step in numbers:
        model.base_model(**batch(model, seed=step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


class _Regression(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> object:
        from collections import namedtuple
        from types import SimpleNamespace

        loss = self.q(x).square().mean()
        if self.kind == "dict":
            return {"loss": loss}
        return namedtuple("Output", "loss")(loss) if self.kind == "namedtuple" else SimpleNamespace(loss=loss)


def _loss_of(output: object) -> Tensor:
    return output["loss"] if isinstance(output, dict) else output.loss
