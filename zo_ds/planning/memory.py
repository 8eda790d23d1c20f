"""Device memory that a step needs besides weights: activations, logits, displaced copies."""

from __future__ import annotations

from dataclasses import dataclass

from zo_ds.forward.joining import PassSize
from zo_ds.forward.replicas import BLOCK_ELEMENTS
from zo_ds.planning.shapes import VECTOR_BYTES, ModelShapes

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Work:
    """One unit of work of a step, at every place.

    Attributes:
        num_directions: N; a step has N + 1 places.
        examples, tokens: of one place's batch, and of each example.
        labelled: positions of that batch that reach the head.
        dtype_bytes: of one element of a matrix, and of activations.
    """

    num_directions: int
    examples: int
    tokens: int
    labelled: int
    dtype_bytes: int

    @property
    def places(self) -> int:
        """N + 1."""
        return self.num_directions + 1

    @property
    def place_tokens(self) -> int:
        """Tokens of one place."""
        return self.examples * self.tokens


def replicas_for(shapes: ModelShapes, work: Work, activation_budget_bytes: int) -> int:
    """Places in one pass, as the evaluator chooses them from the same budget.

    The largest result of one place's backbone is a layer's widest activation, or a norm's fp32 copy of the stream.
    """
    width = max(shapes.widest * work.dtype_bytes, shapes.hidden * FLOAT_BYTES)
    return min(work.places, PassSize(None, activation_budget_bytes).for_activations(width * work.place_tokens))


def layers_bytes(shapes: ModelShapes, work: Work, places: int) -> int:
    """Most activations alive while so many places flow through the layers, in bytes.

    What the embeddings gave and a layer's input stay while the layer runs, in the matrices' dtype. On top of them are
    attention's tensors, or the sum after attention and the MLP's. A norm gives fp32, as under autocast on CUDA.
    """
    size, hidden = work.dtype_bytes, shapes.hidden
    norm = max(size, VECTOR_BYTES) * hidden
    cast = size * hidden if size < VECTOR_BYTES else 0
    attention = norm + cast + size * shapes.narrow
    # The norm's result is held in a gated or parallel MLP, and is itself the stream where norms come last.
    mlp = size * hidden + size * shapes.wide_alive * shapes.widest + norm
    entering = size * hidden + norm + cast + size * shapes.widest
    norms = size * hidden + 3 * FLOAT_BYTES * hidden
    # A mask [examples, 1, tokens, tokens] as booleans, for as long as the layers run.
    stays = size * hidden * (1 + shapes.tables) + work.tokens
    token = stays + max(attention, mlp, entering, norms)
    # One fp32 vector for every replica where a bias or a norm is displaced.
    vectors = places * max(shapes.widest, shapes.hidden) * (FLOAT_BYTES + size)
    return places * work.place_tokens * token + vectors


def head_bytes(shapes: ModelShapes, work: Work, places: int) -> int:
    """Most activations alive while the head runs for one place: hidden states of all, logits and their loss of one."""
    states = places * work.place_tokens * shapes.hidden * max(work.dtype_bytes, VECTOR_BYTES)
    if not shapes.head_products:
        return states
    # Logits in the matrices' dtype, in fp32, and their log-softmax.
    logits = shapes.vocabulary * (work.dtype_bytes + 2 * FLOAT_BYTES)
    return states + work.labelled * (logits + shapes.hidden * (work.dtype_bytes + FLOAT_BYTES))


def activation_bytes(shapes: ModelShapes, work: Work, places: int) -> int:
    """Most activations alive in a pass of so many places, in bytes."""
    return max(layers_bytes(shapes, work, places), head_bytes(shapes, work, places))


def scratch_bytes(shapes: ModelShapes, work: Work, places: int) -> int:
    """What displaced weights need on top of `activation_bytes`, in bytes.

    In a pass that is a block of one matrix. The first step is also run one place at a time, to check the batched
    losses: fewer activations, but a displaced copy of one matrix of every shape.
    """
    rows = max(min(BLOCK_ELEMENTS, shapes.largest_elements), shapes.whole_block_elements)
    block = (rows + shapes.unknown_elements) * work.dtype_bytes
    if not shapes.trained_bytes(work.dtype_bytes):
        block = 0
    copies = shapes.copied_matrix_elements * work.dtype_bytes + shapes.copied_vector_elements * FLOAT_BYTES
    # The check's own samples: an fp32 copy of one place's widest result, and its square.
    samples = 2 * FLOAT_BYTES * work.place_tokens * shapes.widest
    now = activation_bytes(shapes, work, places) + block + samples
    # Of the positions' table and its like there is one copy, not two.
    first = activation_bytes(shapes, work, 1) + copies + samples + rows * work.dtype_bytes
    # Before that, the batch runs doubled at theta, to find the batch axis.
    doubled = activation_bytes(shapes, work, 2)
    return max(now, first, doubled) - activation_bytes(shapes, work, places)
