"""Layers that read the same tensor are computed together, wherever they do, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adalora_kernels.integrations import siblings
from adalora_kernels.integrations.peft import patch_model, unpatch_model
from adalora_kernels.integrations.svd_layer import FusedSVDLinear
from tests.integrations.sibling_models import LLAMA, assert_same, block, linked, nodes, pair, steps
from tests.integrations.small_models import batch, build


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is computed together."""
    found: list[int] = []
    call = siblings.svd_linear_group

    def spied(x: Tensor, layers: Any, **options: Any) -> tuple[Tensor, ...]:
        found.append(len(layers))
        return call(x, layers, **options)

    monkeypatch.setattr(siblings, "svd_linear_group", spied)
    return found


@pytest.mark.parametrize(
    ("architecture", "options", "together"),
    [("llama", LLAMA, [3, 2]), ("deberta", {}, [3, 2])],
    ids=["llama", "deberta"],
)
def test_same_losses_and_gradients(
    architecture: str, options: dict[str, Any], together: list[int], groups: list[int]
) -> None:
    """DeBERTa's query and key also read the relative positions, without value. In fp64, so that steps stay together."""
    theirs = build(architecture, dtype=torch.float64, **{"layers": 1, **options}).double()
    alone = patch_model(copy.deepcopy(theirs), siblings=False)
    ours = patch_model(copy.deepcopy(theirs), siblings=True)
    expected = steps(theirs, 3)
    assert not groups
    for found in (steps(alone, 3), steps(ours, 3)):
        for got, want in zip(found, expected, strict=True):
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-10)
    assert groups == together * 2  # the first step learns


def test_one_node_for_each_group() -> None:
    ours = patch_model(build("llama", **LLAMA), siblings=True)
    alone = patch_model(build("llama", **LLAMA), siblings=False)
    for model in (ours, alone):
        steps(model, 1)
    counts = nodes(ours(**batch(ours)).loss)
    assert (counts["_SVDLinearGroupBackward"], counts["_SVDLinearBackward"]) == (2, 2)
    assert nodes(alone(**batch(alone)).loss)["_SVDLinearBackward"] == 7


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_what_its_forward_did(use_reentrant: bool, groups: list[int]) -> None:
    """Also in the step that learns, whose recomputation comes after it; and with the same dropout."""
    plain = patch_model(build("llama", dtype=torch.float64, lora_dropout=0.3, **LLAMA), siblings=True)
    checkpointed = copy.deepcopy(plain)
    checkpointed.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    expected = steps(plain, 3)
    for got, want in zip(steps(checkpointed, 3), expected, strict=True):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value)
    assert groups.count(3) == 2 + 2 * 2


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(**batch(model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_learned_applies_after_a_fused_update(groups: list[int]) -> None:
    """Which leaves no trace in the versions of what it writes to."""
    ours = patch_model(build("llama", **LLAMA), siblings=True)
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], fused=True)
    _trained(ours, optimizer)
    assert not groups
    _trained(ours, optimizer)
    assert groups == [3, 2]


def test_nothing_begins_to_apply_in_a_capture(groups: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients and without: a group's kernels are launched before they are captured."""
    ours = patch_model(build("llama", **LLAMA), siblings=True)
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad])
    _trained(ours, optimizer)
    with monkeypatch.context() as capture:
        capture.setattr(siblings, "_capturing", lambda: True)
        _trained(ours, optimizer)
        with torch.no_grad():
            ours(**batch(ours))
    assert not groups
    _trained(ours, optimizer)
    monkeypatch.setattr(siblings, "_capturing", lambda: True)
    _trained(ours, optimizer)
    assert groups == [3, 2] * 2


def test_evaluation_and_generation(groups: list[int]) -> None:
    """Without gradients what was learned applies at once, also to a single token; inference tensors run alone."""
    alone = patch_model(build("llama", **LLAMA).eval(), siblings=False)
    ours = patch_model(copy.deepcopy(alone), siblings=True)
    tokens = batch(ours)["input_ids"][:1]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    results = [model.generate(input_ids=tokens, **options) for model in (alone, ours)]
    assert torch.equal(*results)
    assert groups == [3, 2] * 4
    with torch.inference_mode():
        torch.testing.assert_close(ours(input_ids=tokens).logits, alone(input_ids=tokens).logits)
    assert groups == [3, 2] * 4


def test_input_that_is_another_or_was_changed_between(groups: list[int]) -> None:
    alone, ours, x = pair()
    for between in (lambda x: x, torch.clone, lambda x: x.detach()):
        for model in (alone, ours):
            block(model).between = between
        assert_same(alone, ours, x)
    with torch.no_grad():
        for model in (alone, ours):
            block(model).between = lambda x: x.mul_(2)  # the same tensor, of another version
        torch.testing.assert_close(ours(x), alone(x))
    assert groups[0] == 3


def test_output_that_is_not_used_is_dropped_and_unlearned(groups: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    alone, ours, x = pair()
    made: list[weakref.ref[Tensor]] = []
    call = siblings.svd_linear_group

    def remembering(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        ys = call(*args, **options)
        made.extend(weakref.ref(y) for y in ys)
        return ys

    monkeypatch.setattr(siblings, "svd_linear_group", remembering)
    for model in (alone, ours):
        block(model).last = False
    y = ours(x.requires_grad_())
    assert groups == [3] and made[2]() is None  # by reference counting: no cycle holds it
    y.sum().backward()
    with torch.no_grad():
        ours(x)
    assert groups == [3, 2]
    assert_same(alone, ours, x.detach())
    for model in (alone, ours):
        block(model).last = True
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(ours(x), alone(x))
    assert groups[-3:] == [2, 2, 3]
    gc.collect()
    assert not any(ref() is not None for ref in made)


def test_outputs_die_with_x() -> None:
    _, ours, x = pair()
    (together,) = linked(ours)
    parent = block(ours)
    together._begin(parent, ())
    with torch.no_grad():
        own = x.clone()
        parent.q(own)
        reading = together._frames[threading.get_ident()].reading
        assert set(reading.waiting) == {"k", "v"}
        del own
        assert not reading.waiting
    together._end(parent, (), x)


def test_forward_that_fails_leaves_nothing() -> None:
    alone, ours, x = pair()

    def fail(x: Tensor) -> Tensor:
        raise KeyError

    block(ours).between = fail
    with pytest.raises(KeyError):
        ours(x)
    assert not linked(ours)[0]._frames
    block(ours).between = lambda x: x
    assert_same(alone, ours, x)


def test_hooks_on_a_sibling(groups: list[int]) -> None:
    """One on the output sees it as ever; where one may change the input or wraps it the layer runs alone."""
    alone, ours, x = pair()
    seen: list[Any] = []
    for model in (alone, ours):
        block(model).k.register_forward_hook(lambda module, args, output: seen.append(module) or 2 * output)
    assert_same(alone, ours, x)
    assert len(seen) == 2 and groups == [3]
    for model in (alone, ours):
        block(model).v.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_same(alone, ours, x)
    for model in (alone, ours):
        block(model).q.register_full_backward_hook(lambda *_: seen.append("backward"))
    assert_same(alone, ours, x)
    assert seen.count("backward") == 2 and groups[1] == 2


@pytest.mark.parametrize("change", ["disabled", "merged", "frozen", "rank 0", "base hook", "all disabled"])
def test_sibling_that_is_different(change: str, groups: list[int]) -> None:
    alone, ours, x = pair()
    for model in (alone, ours):
        k = block(model).k
        if change == "disabled":
            k.enable_adapters(False)
        elif change == "merged":
            k.merge()
        elif change == "frozen":
            k.requires_grad_(False)
        elif change == "rank 0":
            k.lora_A["default"] = nn.Parameter(torch.zeros(0, 8, dtype=torch.float64))
            k.lora_E["default"] = nn.Parameter(torch.zeros(0, 1, dtype=torch.float64))
            k.lora_B["default"] = nn.Parameter(torch.zeros(6, 0, dtype=torch.float64))
        elif change == "base hook":
            k.base_layer.register_forward_hook(lambda module, args, output: 3 * output)
        else:
            model.base_model.disable_adapter_layers()
    assert_same(alone, ours, x)
    assert groups == {"frozen": [3], "rank 0": [3], "all disabled": []}.get(change, [2])


def test_adapter_that_changes_between_two_calls() -> None:
    """What was computed ahead with other parameters isn't handed out."""
    alone, ours, x = pair()
    for model in (alone, ours):
        factors = block(model).k.lora_A
        other = nn.Parameter(factors["default"].detach() + 1)

        def exchange(x: Tensor, factors: Any = factors, other: nn.Parameter = other) -> Tensor:
            factors["default"] = other
            return x

        block(model).between = exchange
    with torch.no_grad():
        torch.testing.assert_close(ours(x), alone(x))


def test_retained_graph_and_autocast() -> None:
    alone, ours, x = pair()
    y = ours(x.requires_grad_()).sum()
    (first,) = torch.autograd.grad(y, [x], retain_graph=True)
    (second,) = torch.autograd.grad(y, [x])
    assert torch.equal(first, second)
    single = [copy.deepcopy(model).float() for model in (alone, ours)]
    with torch.no_grad():
        single[1](x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(*(model(x.detach().float()) for model in single))


def test_threads_do_not_meet() -> None:
    alone, ours, _ = pair()
    barrier = threading.Barrier(2)
    block(ours).between = lambda x: (barrier.wait(10), x)[1]
    inputs = [torch.randn(3, 8, dtype=torch.float64) for _ in range(2)]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def run(i: int) -> None:
        with torch.no_grad():
            found[i] += [ours(inputs[i]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 5
        for y in found[i]:
            torch.testing.assert_close(y, alone(inputs[i]).detach())


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_siblings_of_their_own(way: Callable[[nn.Module], nn.Module], groups: list[int]) -> None:
    model = patch_model(build("llama", **LLAMA).eval(), siblings=True)
    with torch.no_grad():
        model(**batch(model))
        twin = way(model)
        unpatch_model(model)
        assert not linked(model) and not groups
        twin(**batch(twin))
    assert groups == [3, 2]
    assert not {id(s._parent) for s in linked(twin)} & {id(m) for m in model.modules()}


def test_linked_and_unlinked() -> None:
    model = build("llama", **LLAMA)
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}

    def hooked() -> list[str]:
        now = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
        return [name for name in now if now[name] != hooks[name] and name != "base_model.model"]

    patch_model(model, siblings=True)
    assert len(linked(model)) == len(hooked()) == 2
    patch_model(model, siblings=True)
    assert len(linked(model)) == len(hooked()) == 2
    patch_model(model)  # on a CPU: ready, but without hooks
    steps(model, 2)
    assert len(linked(model)) == 2 and not hooked()
    patch_model(model, siblings=False)
    assert not linked(model)
    patch_model(model, siblings=True)
    unpatch_model(model)
    assert not linked(model) and not hooked()
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


def test_automatic_where_the_layers_run_on_triton(groups: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided at a call, since a model may be moved after it was patched; and where it shares a pass over x."""
    model = patch_model(build("llama", **LLAMA))
    steps(model, 2)
    assert not groups
    monkeypatch.setattr(siblings, "_runs_on_triton", lambda layer, x: True)
    steps(model, 4)
    assert not groups
    calls: list[FusedSVDLinear] = []
    with monkeypatch.context() as known:
        known.setattr(FusedSVDLinear, "group_call", lambda layer, x: calls.append(layer))
        steps(model, 1)
    assert not calls  # what doesn't pay isn't prepared again
    monkeypatch.setattr(siblings, "shares_passes", lambda x, layers, **options: True)
    linked(model)[0]._paid.clear(), linked(model)[1]._paid.clear()
    steps(model, 2)
    assert groups == [3, 2] * 2


def test_unloaded_model_loses_its_hooks() -> None:
    model = patch_model(build("llama", **LLAMA), siblings=True)
    inner = model.merge_and_unload()
    inner(**batch(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner.modules())


def test_compiled(groups: list[int]) -> None:
    """Traced as single layers."""
    alone, ours, x = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), alone(x))
    assert not groups
    assert all(type(m) is FusedSVDLinear for m in (block(ours).q, block(ours).k, block(ours).v))
