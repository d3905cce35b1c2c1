"""FLOPs of a step by part of the model, from shapes alone.

A multiplication and an addition are two. Counted are matrix products and attention over the pairs that the causal mask
leaves; left out are norms, activations, rotary embeddings, softmax, embedding rows, dropout, the optimizer. Only what
any program must compute is counted: not recomputed activations, padding or vision layers after the feature layer, and
at positions without a target neither logits nor the last decoder layer except its keys and values. Heads for further
tokens are last layers, each with the language model's head; then its own last layer is needed whole.

    forward            2 per weight and row
    to activations     as much again, where anything below is trained
    to weights         as much again, where the weights are trained; a LoRA pair of rank r: 2 r (inputs + outputs) each
    time

With Vicuna-7B, CLIP ViT-L/14-336, 726 tokens of which 100 are targets: 19.7 TFLOP per sample when the projector is
trained.
"""

from __future__ import annotations

from models.shapes import Counts, LanguageShape, Linear, ModelShape, PartFlops, ProjectorShape, VisionShape
from trainer.config.tuning import Frozen, Full, Lora, TuningPlan


def needed_flops(shape: ModelShape, plan: TuningPlan, counts: Counts) -> dict[str, PartFlops]:
    """FLOPs of a forward and backward over `counts`, by part; with heads for further tokens where there are any."""
    vision_learns = not isinstance(plan.vision, Frozen)
    below = vision_learns or not isinstance(plan.projector, Frozen)
    parts = {
        "vision": vision_flops(shape.vision, counts, vision_learns),
        "projector": _projector(
            shape.projector,
            counts.tiles * shape.features_per_tile,
            isinstance(plan.projector, Full),
            vision_learns,
        ),
        "language": _language(shape.language, counts, plan.language, below, has_heads=shape.mtp is not None),
    }
    if shape.mtp is not None:
        below = below or not isinstance(plan.language, Frozen)
        learns = isinstance(plan.language, Full)
        parts["future"] = _mtp(shape.mtp, counts, plan.future, below, head_learns=learns)
    return parts


def vision_flops(shape: VisionShape, counts: Counts, learns: bool) -> PartFlops:
    """Attention is not causal; its backward costs twice its forward. Pixels need no gradient.

    At native resolution a tile is a patch.
    """
    patches = 2 * counts.tiles * shape.num_patches * shape.patch_inputs * shape.width
    linear = 2 * counts.tiles * shape.num_tokens * shape.layer_weights * shape.num_layers
    attention = 4 * shape.attention_pairs(counts) * shape.width
    if not learns:
        return PartFlops(patches + linear + attention)
    return PartFlops(patches + linear + attention, linear + 2 * attention, patches + linear)


def _projector(shape: ProjectorShape, features: float, learns: bool, vision_learns: bool) -> PartFlops:
    """The first matrix's input needs a gradient only where the vision encoder is trained."""
    forward = 2 * features * shape.weights
    first = 2 * features * shape.linears[0].weights * shape.linears[0].per_token
    if vision_learns:
        return PartFlops(forward, forward, forward if learns else 0.0)
    return PartFlops(forward, forward - first, forward) if learns else PartFlops(forward)


def _language(
    shape: LanguageShape, counts: Counts, tuning: Frozen | Full | Lora, below: bool, *, has_heads: bool
) -> PartFlops:
    """The last layer's keys and values are needed everywhere, the rest of it where something is predicted."""
    num_last = 0 if has_heads else 1
    num_whole = shape.num_layers - num_last
    linear = 2 * sum(_rows(each, counts, num_whole, num_last) * each.weights for each in shape.layer_linears)
    attention = 4 * shape.query_width * (counts.causal_pairs * num_whole + counts.target_pairs * num_last)
    head = 2 * counts.targets * shape.width * shape.vocabulary
    forward = linear + attention + head
    if isinstance(tuning, Frozen):
        return PartFlops(forward, linear + 2 * attention + head if below else 0.0)
    # With nothing trained below, layer 0 needs a gradient of q, k and v but none of its input: not subtracted here.
    backward = PartFlops(forward, linear + 2 * attention + head)
    if isinstance(tuning, Full):
        return backward + PartFlops(to_weights=linear + head)
    linears = adapted(shape, tuning)
    pairs = sum(_rows(each, counts, num_whole, num_last) * (each.inputs + each.outputs) for each in linears)
    adapters = 2 * tuning.rank * pairs
    return backward + PartFlops(adapters, adapters, adapters)


def _mtp(shape: LanguageShape, counts: Counts, tuning: Frozen | Full, below: bool, *, head_learns: bool) -> PartFlops:
    """Every layer is a last one; the head over the vocabulary, which is the language model's, is computed for each."""
    linear = 2 * sum(_rows(each, counts, 0, shape.num_layers) * each.weights for each in shape.layer_linears)
    attention = 4 * shape.query_width * counts.target_pairs * shape.num_layers
    head = 2 * counts.targets * shape.width * shape.vocabulary * shape.num_layers
    learns = isinstance(tuning, Full)
    return PartFlops(
        linear + attention + head,
        linear + 2 * attention + head if below or learns else 0.0,
        (linear if learns else 0.0) + (head if head_learns else 0.0),
    )


def _rows(linear: Linear, counts: Counts, num_whole: int, num_last: int) -> float:
    """Rows of a linear in all layers together; in a last layer only keys and values need every row."""
    everywhere = linear.name in ("k_proj", "v_proj", "join")
    return counts.tokens * num_whole + (counts.tokens if everywhere else counts.targets) * num_last


def adapted(shape: LanguageShape, tuning: Lora) -> list[Linear]:
    """The linears of one layer that get a LoRA pair."""
    everything = tuning.targets == "all_linear"
    return [linear for linear in shape.layer_linears if everything or linear.name in tuning.targets]
