"""Recipes in mergekit's dialect for a base and three experts, which adarank and mergekit are compared on."""

from __future__ import annotations

from typing import Any

EXPERTS = ("code", "chat", "maths")
ADAPTERS = ("of-law", "of-verse")
GRADIENT = [0.0, 0.25, 1.0]
FILTERED = [{"filter": "mlp", "value": 0.9}, {"filter": "self_attn", "value": [0.1, 0.7]}, {"value": 0.4}]


def recipe(method: str, weights: list[Any], parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A recipe in mergekit's dialect; a weight of None gives the model no parameters."""
    models = [{"model": f"./{name}", **({} if w is None else {"parameters": {"weight": w}})}
              for name, w in zip(EXPERTS, weights, strict=True)]  # fmt: skip
    needs_base = {} if method == "linear" else {"base_model": "./base"}
    return {"merge_method": method, **needs_base, "models": models, "parameters": parameters or {}, **more}


def agreeing() -> dict[str, dict[str, Any]]:
    """Recipes on which both must come to the same numbers."""
    plain = [0.2, 0.5, 1.0]
    linear, ta = "linear", "task_arithmetic"
    return {
        "linear": recipe(linear, plain),
        "linear, one weight for all": recipe(linear, [None] * 3, {"weight": 0.7}),
        "linear, negative weight": recipe(linear, [1.0, -0.4, 0.8]),
        "linear, not normalised": recipe(linear, plain, {"normalize": False}),
        "linear, gradient": recipe(linear, [GRADIENT, [1.0, 0.0], 0.5]),
        "linear, gradient, not normalised": recipe(linear, [GRADIENT, [1.0, 0.0], 0.5], {"normalize": False}),
        "linear, filters": recipe(linear, [FILTERED, 0.5, 1.0]),
        "linear, filters for all": recipe(linear, [None, None, 0.3], {"weight": FILTERED}),
        "linear, filters, not normalised": recipe(linear, [FILTERED, 0.5, 1.0], {"normalize": False}),
        "task_arithmetic": recipe(ta, plain),
        "task_arithmetic, lambda": recipe(ta, plain, {"lambda": 0.4}),
        "task_arithmetic, normalised": recipe(ta, plain, {"normalize": True}),
        "task_arithmetic, normalised, lambda": recipe(ta, plain, {"normalize": True, "lambda": 1.5}),
        "task_arithmetic, weights that sum to 0": recipe(ta, [1.0, -0.5, -0.5], {"normalize": True}),
        "task_arithmetic, gradient": recipe(ta, [GRADIENT, [1.0, 0.0], 0.5], {"lambda": 0.8}),
        "task_arithmetic, filters": recipe(ta, [FILTERED, 0.5, 1.0], {"lambda": 0.8}),
        "task_arithmetic, filters, normalised": recipe(ta, [FILTERED, 0.5, 1.0], {"normalize": True}),
        "task_arithmetic, base among the models": _with_base(recipe(ta, plain)),
        "task_arithmetic, dtype float32": recipe(ta, plain, dtype="float32"),
        "task_arithmetic, float32 written as bfloat16": recipe(ta, plain, dtype="float32", out_dtype="bfloat16"),
        "linear, float32 written as bfloat16": recipe(linear, plain, dtype="float32", out_dtype="bfloat16"),
        **_others(plain),
    }


def selecting() -> dict[str, dict[str, Any]]:
    """Recipes that keep or drop whole entries. Where rounding decides on one, two float types come to other values."""
    plain = [0.2, 0.5, 1.0]
    density = {"density": [0.3, 0.8]}
    by_model = recipe("ties", plain)
    for entry, value in zip(by_model["models"], (0.3, GRADIENT, [{"filter": "mlp", "value": 0.5}]), strict=True):
        entry["parameters"]["density"] = value
    return {
        "ties": recipe("ties", plain, {"density": 0.5, "int8_mask": True}),
        "ties, density by model": by_model,
        "ties, gradients": recipe("ties", [GRADIENT, [1.0, 0.0], 0.5], {**density, "lambda": [0.5, 1.0]}),
        "ties, not normalised, rescaled": recipe("ties", plain, {**density, "normalize": False, "rescale": True}),
        "ties, negative weight": recipe("ties", [1.0, -0.4, 0.8], density),
        "breadcrumbs": recipe("breadcrumbs", plain, {"density": 0.6, "gamma": 0.05}),
        "breadcrumbs, defaults": recipe("breadcrumbs", plain),
        "breadcrumbs_ties": recipe("breadcrumbs_ties", plain, {**density, "gamma": 0.1, "normalize": True}),
        "dare_linear, nothing dropped": recipe("dare_linear", plain, {"lambda": 0.7}),
        "dare_ties, nothing dropped": recipe("dare_ties", plain, {"normalize": True}),
        "della, nothing dropped": recipe("della", plain, {"epsilon": 0.1}),
        "della_linear, nothing dropped": recipe("della_linear", plain),
        "sce": recipe("sce", [None] * 3),
        "ties, switches over the layers": recipe(
            "ties", plain, {**density, "normalize": [False, True], "rescale": [True, False]}
        ),
        "arcee_fusion": recipe("arcee_fusion", plain) | {"models": [{"model": "./code"}]},
        "ram": recipe("ram", [None] * 3, {"epsilon": 0.02}),
        "ram, defaults": recipe("ram", [None] * 3),
        "ramplus_tl": recipe("ramplus_tl", [None] * 3, {"epsilon": [0.01, 0.03]}),
        "ramplus_tl, r and alpha": recipe("ramplus_tl", [None] * 3, {"epsilon": 0.02, "r": [0.1, 0.9], "alpha": 3.0}),
        "ties, slices": _slices()["task_arithmetic, slices"]
        | {"merge_method": "ties", "parameters": {"density": [0.3, 0.8]}},
        "sce, a third selected": recipe("sce", [None] * 3, {"select_topk": 0.3, "int8_mask": True}),
    }


def _others(plain: list[float]) -> dict[str, dict[str, Any]]:
    """Interpolations and Model Stock."""
    one = {"models": [{"model": "./base"}, {"model": "./code"}]}
    two = {"models": recipe("nuslerp", plain)["models"][:2]}
    by_filter = [
        {"filter": "self_attn", "value": [0.0, 0.5, 0.3, 1.0]},
        {"filter": "mlp", "value": 0.7},
        {"value": 0.5},
    ]
    return {
        "slerp": recipe("slerp", plain, {"t": 0.3}) | one,
        "slerp, gradients by filter": recipe("slerp", plain, {"t": by_filter}) | one,
        "nuslerp": recipe("nuslerp", plain) | two,
        "nuslerp, rows": recipe("nuslerp", plain, {"nuslerp_flatten": False}) | two,
        "nuslerp, row-wise": recipe("nuslerp", plain, {"nuslerp_flatten": False, "nuslerp_row_wise": True}) | two,
        "nuslerp, no base": {k: v for k, v in (recipe("nuslerp", plain) | two).items() if k != "base_model"},
        "model_stock": recipe("model_stock", [None] * 3),
        "model_stock, filter_wise": recipe("model_stock", [None] * 3, {"filter_wise": True}),
        "task_arithmetic, lambda as gradient": recipe("task_arithmetic", plain, {"lambda": [0.2, 1.0]}),
        **_on_the_sphere(plain),
        **_switches(plain),
        **_slices(),
    }


def _on_the_sphere(plain: list[float]) -> dict[str, dict[str, Any]]:
    """Karcher means, Multi-SLERP and NearSwap."""
    one = {"models": [{"model": "./code"}]}
    alone = {"models": [{"model": f"./{name}"} for name in EXPERTS]}
    karcher = {"merge_method": "karcher", **alone}
    return {
        "karcher": karcher,
        "karcher, one step": karcher | {"parameters": {"max_iter": 1}},
        "karcher, tolerance over the layers": karcher | {"parameters": {"max_iter": 50, "tol": [1e-2, 1e-6]}},
        "karcher, base listed": karcher | {"models": [{"model": "./base"}, *alone["models"]]},
        "multislerp": recipe("multislerp", plain),
        "multislerp, no base": {k: v for k, v in recipe("multislerp", plain).items() if k != "base_model"},
        "multislerp, gradient": recipe("multislerp", [GRADIENT, [1.0, 0.0], 0.5]),
        "multislerp, filters, not normalised": recipe("multislerp", [FILTERED, 0.5, 1.0], {"normalize_weights": False}),
        "nearswap": recipe("nearswap", plain, {"t": 0.01}) | one,
        "nearswap, gradients by filter": recipe("nearswap", plain, {"t": FILTERED}) | one,
    }


def _switches(plain: list[float]) -> dict[str, dict[str, Any]]:
    """Settings that are true or false, over the layers and by filter."""
    switch = [{"filter": "mlp", "value": [False, True, True]}, {"filter": "self_attn", "value": True}, {"value": False}]
    two = {"models": recipe("nuslerp", plain)["models"][:2]}
    return {
        "linear, normalize over the layers": recipe("linear", plain, {"normalize": [True, False]}),
        "linear, normalize by filter": recipe("linear", plain, {"normalize": switch}),
        "task_arithmetic, normalize over the layers": recipe("task_arithmetic", plain, {"normalize": [False, True]}),
        "task_arithmetic, normalize by filter": recipe("task_arithmetic", plain, {"normalize": switch}),
        "nuslerp, switches by filter": recipe(
            "nuslerp", plain, {"nuslerp_flatten": switch, "nuslerp_row_wise": [True, False]}
        )
        | two,
        "model_stock, filter_wise over the layers": recipe("model_stock", [None] * 3, {"filter_wise": [True, False]}),
        "multislerp, normalize_weights by filter": recipe("multislerp", plain, {"normalize_weights": switch}),
    }


def _slice(*sources: tuple[str, int, int, dict[str, Any] | None], **more: Any) -> dict[str, Any]:
    """A slice of (model, first layer, the one after the last, parameters)."""
    entries = [{"model": f"./{model}", "layer_range": [start, stop], **({"parameters": given} if given else {})}
               for model, start, stop, given in sources]  # fmt: skip
    return {"sources": entries, **more}


def _slices() -> dict[str, dict[str, Any]]:
    """Layers of models of four, put in another order, copied or merged."""
    still = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
    by_filter = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.5]}, {"value": 0.5}]
    passthrough: dict[str, Any] = {"merge_method": "passthrough"}
    weights = [{"weight": value} for value in (GRADIENT, [{"filter": "layers.2.", "value": 0.3}], 0.5)]
    halves = [
        _slice(("base", 0, 2, None), ("code", 0, 2, weights[0]), ("chat", 1, 3, weights[2])),
        _slice(
            ("base", 2, 4, None), ("code", 2, 4, weights[1]), ("maths", 1, 3, weights[0]), parameters={"weight": 0.7}
        ),
    ]
    return {
        "passthrough": passthrough | {"models": [{"model": "./code"}]},
        "passthrough, scaled": passthrough | {"models": [{"model": "./code", "parameters": {"scale": GRADIENT}}]},
        "passthrough, slices of two models": passthrough | {"slices": [_slice(("code", 0, 3, None)), _slice(("chat", 2, 4, None))]},
        "passthrough, layers that change nothing": passthrough | {"slices": [
            _slice(("code", 0, 3, None)), _slice(("code", 2, 4, {"scale": still}))]},
        "passthrough, a slice of no layers": passthrough | {"slices": [
            _slice(("chat", 0, 0, None)), _slice(("code", 0, 4, None)), _slice(("maths", 4, 4, None))]},
        "linear, slices": {"merge_method": "linear", "parameters": {"normalize": [True, False]}, "slices": [
            _slice(("code", 0, 2, weights[0]), ("chat", 2, 4, weights[2])),
            _slice(("maths", 1, 3, weights[1]), ("code", 0, 2, weights[2]), parameters={"weight": 0.2})]},
        "slerp, slices": {"merge_method": "slerp", "base_model": "./code", "parameters": {"t": by_filter}, "slices": [
            _slice(("code", 0, 3, None), ("chat", 1, 4, None)),
            _slice(("maths", 2, 4, None), ("code", 1, 3, None), base_model="./maths", parameters={"t": [0.1, 0.6]})]},
        "task_arithmetic, slices": {"merge_method": "task_arithmetic", "base_model": "./base", "slices": halves,
                                    "parameters": {"lambda": [0.5, 1.0], "normalize": [False, True]}},
        "nuslerp, slices": {"merge_method": "nuslerp", "slices": [
            _slice(("code", 0, 2, weights[0]), ("chat", 2, 4, weights[2])), _slice(("maths", 2, 4, weights[2]), ("code", 2, 4, weights[0]))]},
    }  # fmt: skip


def dialect() -> dict[str, dict[str, Any]]:
    """Rarer forms of mergekit's dialect: whether each side takes them, and whether they then agree."""
    plain = [0.2, 0.5, 1.0]
    linear, ta = "linear", "task_arithmetic"
    return {
        "weight missing": recipe(linear, [None, 0.5, 1.0]),
        "weights missing, task_arithmetic": recipe(ta, [None] * 3),
        "number written 1e-1, which YAML reads as text": recipe(ta, ["1e-1", 0.5, 1.0]),
        "gradient with a number written 1e-1": recipe(ta, [["1e-1", 1.0], 0.5, 1.0]),
        "lambda written 5e-1": recipe(ta, plain, {"lambda": "5e-1"}),
        "filters that leave tensors to the global weight": recipe(
            ta, [[{"filter": "mlp", "value": 0.9}], 0.5, 1.0], {"weight": 0.4}
        ),
        "filters that leave tensors without weight": recipe(ta, [[{"filter": "mlp", "value": 0.9}], 0.5, 1.0]),
        "filter '*'": recipe(ta, [[{"filter": "mlp", "value": 0.9}, {"filter": "*", "value": 0.1}], 0.5, 1.0]),
        "one condition, not in a list": recipe(ta, [{"filter": "*", "value": 0.9}, 0.5, 1.0]),
        "filters that end in a bare number": recipe(ta, [[{"filter": "mlp", "value": 0.9}, 0.1], 0.5, 1.0]),
        "lambda as gradient": recipe(ta, plain, {"lambda": [0.2, 1.0]}),
        "lambda by filter": recipe(ta, plain, {"lambda": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]}),
        "normalize by filter": recipe(ta, plain, {"normalize": [{"filter": "mlp", "value": True}, {"value": False}]}),
        "int8_mask": recipe(ta, plain, {"int8_mask": True}),
        "rescale and density": recipe(ta, plain, {"rescale": False, "density": 0.5}),
        "unknown parameter": recipe(ta, plain, {"wieght": 2.0}),
        "weight: true": recipe(ta, [True, 0.5, 1.0]),
        "empty parameters": {**recipe(ta, plain), "parameters": None},
        "linear with a base_model": recipe(linear, plain, base_model="./base"),
        "linear with a base_model and a global weight": recipe(linear, plain, {"weight": 0.4}, base_model="./base"),
        "karcher with a base_model": recipe("karcher", [None] * 3, base_model="./base"),
        "settings of other methods": recipe("model_stock", plain, {"density": 0.5, "filter_wise": False, "t": 0.5}),
        "settings for all models, given to one": recipe("ties", [0.5] * 3) | {"models": [
            {"model": f"./{name}", "parameters": {"weight": 0.5, "normalize": False, "lambda": 0.3}} for name in EXPERTS]},
        "name": recipe(ta, plain, name="first"),
        "modules default": {key: value for key, value in recipe(ta, plain).items() if key != "models"}
        | {"modules": {"default": {"models": recipe(ta, plain)["models"]}}},
        "linear, base listed": _with_base(recipe(linear, plain), 0.3),
        "linear, weights that sum to 0": recipe(linear, [1.0, -0.5, -0.5]),
        "task_arithmetic, base listed with a weight": _with_base(recipe(ta, plain), 0.3),
        "the same expert twice": recipe(ta, plain) | {"models": [{"model": "./code", "parameters": {"weight": 0.5}}] * 2},
        "dtype bf16": recipe(ta, plain, dtype="bf16"),
        "a model as a mapping": recipe(ta, plain)
        | {"models": [{"model": {"model": {"path": "./code"}}, "parameters": {"weight": 0.5}}]},
        "one layer, gradient": recipe(ta, [GRADIENT, [1.0, 0.0], 0.5])
        | {"base_model": "./one-layer/base",
           "models": [{"model": f"./one-layer/{n}", "parameters": {"weight": GRADIENT}} for n in EXPERTS]},
    }  # fmt: skip


def forms() -> dict[str, Any]:
    """Recipes of several stages, a mapping for each; and of adapters over a model."""
    first = recipe("slerp", [None] * 3, {"t": [0.2, 0.6]}) | {
        "name": "first",
        "models": [{"model": "./base"}, {"model": "./code"}],
    }
    second = recipe("linear", [None] * 3, {"weight": 0.5}) | {
        "name": "second",
        "models": [{"model": "first"}, {"model": "./maths"}],
    }
    last = recipe("ties", [1.0, 0.5, 0.3], {"density": 0.6}, dtype="float32")
    last["models"] = [
        {**entry, "model": name} for entry, name in zip(last["models"], ("second", "first", "./chat"), strict=True)
    ]
    cut = {
        "merge_method": "passthrough",
        "dtype": "float32",
        "slices": [_slice(("chat", 0, 2, None)), {"sources": [{"model": "first", "layer_range": [1, 4]}]}],
    }
    law, verse = ({"parameters": {"weight": weight}} for weight in (0.7, 0.4))
    ta = {"merge_method": "task_arithmetic", "base_model": "./base", "dtype": "float32"}
    mapped = [{"model": {"model": {"path": "./base"}, "lora": {"path": f"./{name}"}}} for name in ADAPTERS]
    return {
        "several documents, named stages": [first, second, last],
        "stages, slices of one": [first, cut],
        "base+adapter": ta | {"models": [{"model": "./base+./of-law", **law}, {"model": "./base+./of-verse", **verse}]},
        "model, lora": ta | {"models": [{**mapped[0], **law}, {**mapped[1], **verse}]},
        "expert+adapter beside an expert": ta | {"models": [{"model": "./code+./of-law", **law}, {"model": "./chat", **verse}]},
    }  # fmt: skip


def _with_base(values: dict[str, Any], weight: float | None = None) -> dict[str, Any]:
    entry = {"model": "./base", **({} if weight is None else {"parameters": {"weight": weight}})}
    return {**values, "models": [entry, *values["models"]]}
