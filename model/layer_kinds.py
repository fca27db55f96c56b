"""Which layers of an open model have a window, and which have no RoPE.

Each family says it by other keys of its config.json. A function here takes the keys and the number
of layers, and returns (window, window layers) as ModelConfig has them. It raises ValueError, which
goes on after the name of the file, where keys contradict each other.

Source: `configuration_*.py` of transformers 5.24.
"""

SLIDING, FULL = "sliding_attention", "full_attention"


def no_window(content: dict, n_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Llama and OLMo-2 have none. Raises ValueError if the config speaks of one all the same."""
    if content.get("sliding_window") is not None or SLIDING in layer_types_of(content, n_layers):
        raise ValueError(
            f"has a sliding window (sliding_window {content.get('sliding_window')}, layer_types "
            f"{content.get('layer_types')}), which a model of this family does not apply; "
            "take those keys out if they mean nothing"
        )
    return None, ()


def window_everywhere(content: dict, n_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Mistral and Mixtral: null is no window. Qwen3-MoE: only with use_sliding_window."""
    is_used = content.get("use_sliding_window", True)
    window = content["sliding_window"] if is_used else None
    kinds = layer_types_of(content, n_layers)
    expected = [FULL if window is None else SLIDING] * n_layers
    if kinds and kinds != expected:
        raise ValueError(
            f"has layer_types {kinds}, but the window that is used is {window}; a model of this "
            "family has it in all of its layers or in none"
        )
    return window, tuple(range(n_layers)) if window is not None else ()


def window_if_used(content: dict, n_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Qwen and SmolLM3: only with use_sliding_window, and in the layers that layer_types says."""
    window = content["sliding_window"] if content["use_sliding_window"] else None
    kinds = layer_types_of(content, n_layers)
    if window is None:
        if SLIDING in kinds:
            raise ValueError(
                f"has layer_types {kinds}, but use_sliding_window is "
                f"{content['use_sliding_window']} and sliding_window is "
                f"{content['sliding_window']}; the two contradict each other"
            )
        return None, ()
    if kinds:
        return window, tuple(i for i, kind in enumerate(kinds) if kind == SLIDING)
    # Without layer_types: SmolLM3 has the window where it has no RoPE, Qwen from a layer on.
    if "no_rope_layer_interval" in content:
        return window, nope_layers_of(content, n_layers)
    return window, tuple(range(min(content["max_window_layers"], n_layers), n_layers))


def window_in_every_other(content: dict, n_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Qwen2-MoE: without layer_types, in the first layer and each second one, up to a layer."""
    if content["use_sliding_window"] and not content.get("layer_types"):
        n_first = min(content["max_window_layers"], n_layers)
        kinds = [SLIDING if i % 2 == 0 and i < n_first else FULL for i in range(n_layers)]
        content = content | {"layer_types": kinds}
    return window_if_used(content, n_layers)


def layer_types_of(content: dict, n_layers: int) -> list[str]:
    """The kind of each layer; empty if the config does not say."""
    kinds = content.get("layer_types") or []
    if kinds and (len(kinds) != n_layers or not {SLIDING, FULL}.issuperset(kinds)):
        raise ValueError(
            f"has layer_types {kinds}; expected {SLIDING} or {FULL} for each of {n_layers} layers"
        )
    return kinds


def nope_layers_of(content: dict, n_layers: int) -> tuple[int, ...]:
    """SmolLM3's layers without RoPE. In `no_rope_layers` a 1 means that RoPE is used."""
    uses_rope = content.get("no_rope_layers")
    if uses_rope is None:
        interval = content["no_rope_layer_interval"]
        uses_rope = [(layer + 1) % interval != 0 for layer in range(n_layers)]
    if len(uses_rope) < n_layers or not {0, 1}.issuperset(uses_rope):
        raise ValueError(
            f"has no_rope_layers {uses_rope}; expected 0 or 1 for each of {n_layers} layers"
        )
    return tuple(layer for layer in range(n_layers) if not uses_rope[layer])
