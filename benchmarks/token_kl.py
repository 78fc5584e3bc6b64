"""Token KL: the library's one pass in chunks against TRL's full logits, and against the matrix products alone.

Sections of `run.py`; run by itself, this file is one contender (measure.py). Hidden states and the output matrix are
random with the shapes of a model; the backbone's own pass is left out. A pass is forward, mean and backward. Where
Liger is installed, its linear JSD in chunks (plain torch, so it runs on a CPU) is measured beside the variant whose
matrix trains, since it always computes that gradient.

TRL's loss gets full logits of the same tensors, the teacher's without gradient. The floor is what no exact method
can leave out: both sides' logits and the gradient of the unguided states (and of the matrix, where it trains), as
matrix products into memory that is used again, in the same chunks.

Shapes: N tokens, H hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import measure
from measure import Found, Side, bound, row

CHUNK = 512
"""Tokens of a chunk: what `train.kl_chunk_tokens` is where nothing else is set."""
CHECKED = 64
"""Tokens whose values and gradients are compared with float64."""


# --------------------------------------------------------------------------------------------------- one contender


def prepare(case: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    """A contender's passes: `side` is ours, trl, liger or floor; `reverse` and `trains` (the matrix) are variants."""
    import torch

    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    matrix_VH = torch.randn(case["vocabulary"], case["hidden"]) / case["hidden"] ** 0.5
    guided_NH = torch.randn(case["tokens"], case["hidden"])
    unguided_NH = guided_NH + 0.2 * torch.randn_like(guided_NH)
    leaves = unguided_NH.requires_grad_(), matrix_VH.requires_grad_(case.get("trains", False))
    if case["side"] == "floor":
        products = _products(case, guided_NH, *leaves)
        products(min(len(guided_NH), 8))
        return {"pass": lambda: products(len(guided_NH))}
    loss = _loss(case)

    def once(count: int = len(guided_NH)) -> dict[str, Any]:
        loss(guided_NH[:count], leaves[0][:count], leaves[1]).mean().backward()
        for leaf in leaves:
            leaf.grad = None  # so that the next pass makes them anew
        return {}

    once(8)  # libraries are loaded, threads started
    return {"pass": once, "error": lambda: _error(case, loss, guided_NH, *leaves)}


def _loss(case: dict[str, Any]) -> Callable[[Any, Any, Any], Any]:
    """(guided, unguided, matrix) -> a value per token (Liger: their mean)."""
    import torch

    if case["side"] == "ours":
        from sgpo_lib.losses import token_kl
        from sgpo_lib.losses.head import Head

        kl = token_kl.reverse_kl_unguided_to_guided if case.get("reverse") else token_kl.forward_kl_guided_to_unguided
        return lambda guided_NH, unguided_NH, matrix_VH: kl(guided_NH, unguided_NH, Head(matrix_VH), case["chunk"])
    if case["side"] == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        jsd = LigerFusedLinearJSDLoss(beta=1.0 if case.get("reverse") else 0.0, weight_hard_loss=0.0,
                                      weight_soft_loss=1.0, compiled=False, chunk_size=case["chunk"])

        def liger(guided_NH: Any, unguided_NH: Any, matrix_VH: Any) -> Any:
            labels_N = torch.zeros(len(guided_NH), dtype=torch.long)
            return jsd(unguided_NH, matrix_VH, guided_NH, matrix_VH.detach(), labels_N)

        return liger
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

    def trl(guided_NH: Any, unguided_NH: Any, matrix_VH: Any) -> Any:
        with torch.no_grad():
            teacher_NV = torch.nn.functional.linear(guided_NH, matrix_VH)
        student_NV = torch.nn.functional.linear(unguided_NH, matrix_VH)
        return compute_full_logit_self_distillation_loss(student_NV, teacher_NV,
                                                         distillation_alpha=1.0 if case.get("reverse") else 0.0)

    return trl


def _products(case: dict[str, Any], guided_NH: Any, unguided_NH: Any, matrix_VH: Any) -> Callable[[int], dict]:
    import torch

    chunk, trains, matrix_VH = case["chunk"], matrix_VH.requires_grad, matrix_VH.detach()
    unguided_NH = unguided_NH.detach()
    buffers_CV = [torch.empty(min(chunk, len(guided_NH)), len(matrix_VH)) for _ in range(2)]
    gradient_NH = torch.empty_like(guided_NH)
    gradient_VH = torch.zeros_like(matrix_VH) if trains else None

    @torch.no_grad()
    def products(count: int) -> dict[str, Any]:
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            sides = [buffer_CV[: part.stop - start] for buffer_CV in buffers_CV]
            for hidden_NH, logits_CV in zip((guided_NH, unguided_NH), sides, strict=True):
                torch.mm(hidden_NH[part], matrix_VH.T, out=logits_CV)
            torch.mm(sides[1], matrix_VH, out=gradient_NH[part])
            if gradient_VH is not None:
                gradient_VH.addmm_(sides[1].T, unguided_NH[part])
        return {}

    return products


def _error(case: dict[str, Any], loss: Callable[..., Any], guided_NH: Any, unguided_NH: Any,
           matrix_VH: Any) -> dict[str, Any]:
    """Of a pass over all tokens, some of them beside the same quantity in float64."""
    import torch

    chosen_N = torch.linspace(0, len(guided_NH) - 1, min(CHECKED, len(guided_NH))).long()
    value_N = loss(guided_NH, unguided_NH, matrix_VH)
    value_N.sum().backward()
    exact_NH = unguided_NH.detach()[chosen_N].double().requires_grad_()
    with torch.no_grad():
        p_NV = torch.log_softmax(guided_NH[chosen_N].double() @ matrix_VH.double().T, -1)
    q_NV = torch.log_softmax(exact_NH @ matrix_VH.detach().double().T, -1)
    first_NV, second_NV = (q_NV, p_NV) if case.get("reverse") else (p_NV, q_NV)
    exact_N = (first_NV.exp() * (first_NV - second_NV)).sum(-1)
    exact_N.sum().backward()
    off_NH = unguided_NH.grad[chosen_N] - exact_NH.grad
    return {"value_error": float((value_N.detach()[chosen_N] - exact_N.detach()).abs().max()),
            "mean_value": float(exact_N.detach().mean()),
            "gradient_error": float(off_NH.norm() / exact_NH.grad.norm())}


# ------------------------------------------------------------------------------------------------------- sections


def token_kl(smoke: bool, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time, memory and error at one size, with a frozen and a training matrix, forward and reverse."""
    shape = {"tokens": 128, "vocabulary": 2048, "hidden": 32} if smoke else \
        {"tokens": 2048, "vocabulary": 49_152, "hidden": 576}  # fmt: skip
    chunk = 32 if smoke else CHUNK
    side = functools.partial(_side, shape)
    variants: dict[str, dict[str, Any]] = {"forward KL": {}, "training matrix": {"trains": True},
                                           "reverse KL": {"reverse": True}}
    if smoke:
        del variants["reverse KL"]

    found: dict[str, Any] = {"shape": shape, "chunk": chunk}
    rows: list[dict[str, Any]] = []
    for name, fields in variants.items():
        sides = {who: side(who, chunk, **fields) for who in ("ours", "floor", "trl")}
        if "trains" in fields and importlib.util.find_spec("liger_kernel"):
            sides["liger"] = side("liger", chunk, **fields)
        here = found[name] = measure.race(sides, repeats, also={"ours": "error", "trl": "error"})
        what = f"token KL, {name}"
        rows += [*_lines(what, here, targets=not fields), *_errors(what, here["ours"], here["trl"])]
        if "trains" in fields:
            rows += _liger_lines(what, here)
    return rows, found


def large(smoke: bool, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A long response with a large vocabulary, once: how much memory a forward and backward pass takes."""
    shape = {"tokens": 256, "vocabulary": 4096, "hidden": 32} if smoke else \
        {"tokens": 16_384, "vocabulary": 151_936, "hidden": 896}  # fmt: skip
    with measure.Race({"ours": _side(shape, "ours", 32 if smoke else CHUNK)}) as started:
        found = started.turn("pass")["ours"]
    logits = shape["tokens"] * shape["vocabulary"] * 4 / 1e6
    rows = [bound(f"token KL, {shape['tokens']:,} x {shape['vocabulary']:,}: peak extra memory", "MB",
                  found["extra_MB"], 2000),
            row("the same against one side's logits in float32, never made", "MB", found["extra_MB"], "", logits),
            row("the same: one pass", "s", found["seconds"], "", None)]
    return rows, {"passes": 1, "shape": shape, "ours": found}


def growth(smoke: bool, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time and memory of ours and TRL as tokens grow, and as the vocabulary does."""
    hidden, chunk = (32, 32) if smoke else (576, CHUNK)
    tokens, at_vocabulary = ((64,), 1024) if smoke else ((128, 512, 2048), 49_152)
    vocabularies, at_tokens = ((), 64) if smoke else ((2048, 16_384, 151_936), 512)
    shapes = [{"tokens": n, "vocabulary": at_vocabulary} for n in tokens]
    shapes += [{"tokens": at_tokens, "vocabulary": v} for v in vocabularies]
    rows, found = [], {}
    for shape in shapes:
        shape = shape | {"hidden": hidden}
        what = f"token KL, {shape['tokens']:,} x {shape['vocabulary']:,}"
        here = found[what] = measure.race({who: _side(shape, who, chunk) for who in ("ours", "trl")}, repeats)
        for key, unit in (("seconds", "s"), ("extra_MB", "MB")):
            rows.append(row(f"{what}: {'time' if unit == 's' else 'peak extra memory'}", unit, here["ours"][key], "TRL",
                            here["trl"][key]))
    return rows, found


def _side(shape: dict[str, Any], who: str, chunk: int, **fields: Any) -> Side:
    return Side("token_kl.py", {**shape, "side": who, "chunk": chunk, **fields}, optional=who == "liger")


def _liger_lines(what: str, found: dict[str, Found]) -> list[dict[str, Any]]:
    """Against Liger's chunked loss in plain torch, which always computes the matrix's gradient."""
    liger, note = found.get("liger", {"failed": "Liger is not installed"}), ""
    if "failed" in liger:
        liger, note = {"seconds": None, "extra_MB": None}, f"peer not measured: {liger['failed']}"
    return [row(f"{what}: {name}", unit, found["ours"][key], "Liger's JSD", liger[key], note=note)
            for name, unit, key in (("time", "s", "seconds"), ("peak extra memory", "MB", "extra_MB"))]


def _errors(what: str, mine: Found, trl: Found) -> list[dict[str, Any]]:
    return [row(f"{what}: {key.replace('_', ' ')} against float64", unit, mine["error"][key], "TRL",
                trl["error"][key]) for key, unit in (("value_error", "nats"), ("gradient_error", "of its norm"))]


def _lines(what: str, found: dict[str, Found], *, targets: bool) -> list[dict[str, Any]]:
    mine, trl = found["ours"], found["trl"]
    return [row(f"{what}: time", "s", mine["seconds"], "TRL", trl["seconds"], 0.7 if targets else None),
            row(f"{what}: time", "s", mine["seconds"], "matrix products", found["floor"]["seconds"],
                1.3 if targets else None),
            row(f"{what}: peak extra memory", "MB", mine["extra_MB"], "TRL", trl["extra_MB"],
                0.1 if targets else None)]


if __name__ == "__main__":
    measure.serve(prepare(measure.case()))
