"""Direct calls of the compiled CPU kernels with arguments that are wrong: errors that name them, no wild read or write."""

from __future__ import annotations

import re

import pytest
import torch

from em3.backends import cpp

pytestmark = pytest.mark.skipif(cpp.unavailable() is not None, reason=f"em3._C: {cpp.unavailable()}")


def direct():
    """Arguments of the compiled functions, by name."""
    h, b, q, e, widths, t = 2, 3, 4, 3, (8, 5), 10
    f = lambda *shape: torch.randn(shape, dtype=torch.float32)  # noqa: E731
    values = [f(t, widths[0]), f(b, 6, widths[1])]
    return dict(
        u=[f(h, 1, q, c) for c in widths], c=f(2, h, 1, q), w=[f(h, e, c) for c in widths], values=values, offsets=[torch.tensor([0, 4, 4, 10]), None],
        masks=[None, torch.rand(b, 6) > 0.5], y=[f(h, b, q, c) for c in widths], o=f(h, b, q, e), mass=f(2, h, b, q),
        lse=f(h, b, q), threads=1,
    )  # fmt: skip


def direct_backward():
    like = direct()
    return like | dict(
        dout=torch.randn_like(like["o"]), dmass=torch.randn_like(like["mass"]), du=[torch.empty_like(u) for u in like["u"]],
        dc=torch.empty_like(like["c"]), dw=[torch.empty_like(w) for w in like["w"]], dx=[torch.empty_like(x) for x in like["values"]],
    )  # fmt: skip


def direct_target():
    """The arguments of a direct call of the bank's forward: 2 heads, 3 users of 2 targets, 10 places, 5 rows of 8."""
    f = torch.randn
    history = torch.tensor([0, 4, -1, 2, 2, 1, 3, 0, 4, 9])  # 9 is outside: missing
    return dict(u=f(2, 3, 2, 8), w=f(2, 6, 8), history=history, offsets=torch.tensor([0, 4, 4, 10]), bank=f(5, 8), bias=f(10, 2),
                y=f(2, 3, 2, 8), o=f(2, 3, 2, 6), lse=f(2, 3, 2), threads=1)  # fmt: skip


def direct_target_backward():
    like = direct_target()
    like["lse"].fill_(9.0)
    return like | dict(dout=torch.randn(2, 3, 2, 6), du=torch.empty(2, 3, 2, 8), dw=torch.empty(2, 6, 8), dx=torch.empty(10, 8),
                       dbias=torch.zeros(10, 2))  # fmt: skip


def direct_contrast():
    f = torch.randn
    return dict(x=f(5, 8), y=f(7, 8), scale=torch.tensor(3.0, dtype=torch.float64), bias=torch.tensor(-1.0, dtype=torch.float64),
                item_ids=torch.tensor([4, -1, 4, 2**60, 0]), offset=f(7), kind="sigmoid", limits=(40.0, -60.0, 150.0, 20.0), row=f(5).double(),
                col=f(5).double(), threads=2)  # fmt: skip


def direct_contrast_backward():
    return direct_contrast() | dict(
        drow=torch.randn(5), dcol=torch.randn(5), dx=torch.empty(5, 8), dy=torch.empty(7, 8), dscale=torch.empty((), dtype=torch.float64),
        dbias=torch.empty((), dtype=torch.float64), doffset=torch.empty(7), kind="infonce",
    )  # fmt: skip


def direct_linear():
    """The arguments of a direct call: 3 adapters of rank 2, 10 rows of 8 to 6."""
    f = torch.randn
    return dict(x=f(10, 8), a=f(3, 2, 8), b=f(3, 6, 2), scaling=0.5, scalings=f(3), adapter=torch.tensor([0, 2, -1, 2, 1, 9, -7, 0, 0, 1]),
                offsets=None, y=f(10, 6), drop=None, threads=2)  # fmt: skip


def direct_linear_backward():
    like = direct_linear()
    del like["y"]
    return dict(dy=torch.randn(10, 6)) | like | dict(dx=torch.randn(10, 8), da=torch.empty(3, 2, 8), db=torch.empty(3, 6, 2))


def direct_contrast_whole():
    f = torch.randn
    return dict(content=f(5, 8), ids_embedding=f(5, 8), negatives=f(20, 8), scale=3.0, bias=0.0, item_ids=torch.tensor([4, -1, 4, 2**60, 0]),
                log_q=f(5), weight=torch.rand(5), kind="infonce", duplicates="positive", direction="both", reduction="mean",
                smoothing=0.1, normalize=True, state=torch.randn(cpp.compiled().contrastive_loss_whole_state(
                    5, 20, True, "positive", "both", True, True), dtype=torch.float64),
                limits=(40.0, -60.0, 150.0, 20.0), threads=2)  # fmt: skip


def direct_contrast_whole_backward():
    f, number, given = torch.randn, torch.tensor(1.0, dtype=torch.float64), direct_contrast_whole()
    cpp.compiled().contrastive_loss_whole_forward(**given, most_log_q=9.0)
    return dict(upstream=1.0) | given | dict(
        dcontent=f(5, 8), dids=f(5, 8), dnegatives=f(20, 8), dscale=number.clone(), dbias=number.clone(), dlog_q=f(5), dweight=f(5),
    )  # fmt: skip


DIRECT = {
    "lora_linear_forward": direct_linear, "lora_linear_backward": direct_linear_backward,
    "contrastive_loss_forward": direct_contrast, "contrastive_loss_backward": direct_contrast_backward,
    "contrastive_loss_whole_forward": lambda: direct_contrast_whole() | dict(most_log_q=9.0), "contrastive_loss_whole_backward": direct_contrast_whole_backward,
    "qformer_attention_forward": direct, "qformer_attention_backward": direct_backward,
    "lora_target_attention_forward": direct_target, "lora_target_attention_backward": direct_target_backward,
}  # fmt: skip


# What no longer fits where that one is longer.
MISFITS = {
    "contrastive_loss": {"x": "y", "y": "offset", "content": "ids_embedding", "negatives": "state"},
    "lora_linear_forward": {"x": "adapter", "a": "b"}, "lora_linear_backward": {"dy": "adapter", "a": "b"},
}  # fmt: skip


def places(given):
    """Every tensor among the arguments: (its name, the list or dict it is in, its key there)."""
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            yield name, given, name
        elif isinstance(value, list):
            yield from ((f"{name}[{i}]", value, i) for i, v in enumerate(value) if v is not None)


def spoil(tensor, how):
    return {
        "dtype": lambda: tensor.to(torch.bfloat16 if tensor.dtype == torch.float64 else torch.float64), "device": lambda: tensor.to("meta"), "rank": lambda: tensor[None],
        "size": lambda: torch.cat([tensor, tensor]), "layout": lambda: torch.stack([tensor, tensor], -1)[..., 0],
    }[how]()  # fmt: skip


@pytest.mark.parametrize("how", ["dtype", "device", "rank", "size", "layout"])
@pytest.mark.parametrize("name", DIRECT)
def test_the_compiled_code_takes_nothing_on_trust(name, how):
    """A wrong tensor in any place of a direct call is a ValueError that names it, never a wild read or write."""
    function, op_name = getattr(cpp.compiled(), name), name.rsplit("_", 1)[0].removesuffix("_whole")
    function(**DIRECT[name]())
    for i, _ in enumerate(places(DIRECT[name]())):
        given = DIRECT[name]()
        where, holder, key = list(places(given))[i]
        # A longer jagged stream, or a larger bank, is a right one, but then its gradient is too short; a longer history has too
        # short a bias; more candidates have too few offsets, more rows too few candidates; lse and u say what the sizes are.
        if how in ("size", "layout") and holder[key].dim() == 0:
            continue
        if op_name == "lora_linear" and how == "dtype" and where in ("x", "y", "dy", "dx"):
            holder[key] = holder[key].double()  # float32 and the half types are all right
            with pytest.raises(ValueError, match=f"lora_linear: {where}: was torch.float64, must be torch.float32, torch"):
                function(**given)
            continue
        if (how == "size" and where == "bank") or ((how, where) in {("size", "values[0]")} and name.endswith("forward")):
            continue
        blamed = {"values[0]": "dx[0]", "history": "bias", **MISFITS.get(op_name, MISFITS.get(name, {}))}.get(where, where) if how == "size" else where
        holder[key] = spoil(holder[key], how)
        with pytest.raises(ValueError, match=f"{op_name}: ") as error:
            function(**given)
        if where not in ("lse", "u") and not (how == "size" and where == "u[0]"):
            assert str(error.value).startswith(f"{op_name}: {blamed}: was "), str(error.value)


def test_places_that_no_forward_wrote_are_refused():
    """Rows are read by the places that the state holds."""
    given = direct_contrast_whole_backward()
    given["state"][10] = -1.0
    with pytest.raises(ValueError, match="contrastive_loss: state: was not what the forward wrote"):
        cpp.compiled().contrastive_loss_whole_backward(**given)


@pytest.mark.parametrize("name", ["contrastive_loss_forward", "contrastive_loss_backward"])
def test_a_block_of_two_batches_takes_nothing_on_trust(name):
    """Ids and offsets of rows and columns, sums of the columns' own number."""
    function, sizes = getattr(cpp.compiled(), name), {"item_ids": 5 + 4, "offset": 5 + 7, "col": 4, "dcol": 4, "doffset": 5 + 7}
    given = DIRECT[name]() | {"apart": 4}
    for key in sizes.keys() & given.keys():
        given[key] = torch.ones(sizes[key]).to(given[key].dtype)
    function(**given)
    for key in sizes.keys() & given.keys():
        with pytest.raises(ValueError, match=f"contrastive_loss: {key}: was "):
            function(**given | {key: given[key][:-1]})
    for apart in (8, -1):
        with pytest.raises(ValueError, match="contrastive_loss: y: was 7 rows, must be at least"):
            function(**given | {"apart": apart})


@pytest.mark.parametrize("name", [name for name in DIRECT if "attention" in name])
@pytest.mark.parametrize("offsets", [[1, 4, 4, 10], [0, 4, 3, 10], [0, 4, 4, 11], [0, 4, 2**62, 10]])
def test_the_compiled_code_refuses_wild_offsets(name, offsets):
    given = DIRECT[name]()
    if isinstance(given["offsets"], list):
        given["offsets"][0] = torch.tensor(offsets)
    else:
        given["offsets"] = torch.tensor(offsets)
    with pytest.raises(ValueError, match="offsets must"):
        getattr(cpp.compiled(), name)(**given)


def test_a_list_of_another_length():
    with pytest.raises(ValueError, match=re.escape("masks: held 1 entries, must hold one for each of the 2 streams")):
        cpp.compiled().qformer_attention_forward(**direct() | {"masks": [None]})


@pytest.mark.parametrize("name", DIRECT)
def test_a_tensor_without_memory_is_refused(name):
    """PyTorch's own zeros of some gradients have an address of 0."""
    given = DIRECT[name]()
    where, holder, key = next(iter(places(given)))
    holder[key] = torch._efficientzerotensor(tuple(holder[key].shape))
    with pytest.raises(ValueError, match=re.escape(f"{where}: was without memory")):
        getattr(cpp.compiled(), name)(**given)
