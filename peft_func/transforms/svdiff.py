"""SVDiff: W' = U diag(relu(sigma + shift)) V^T, where W = U diag(sigma) V^T.

Han et al., "SVDiff: Compact Parameter Space for Diffusion Fine-Tuning", arXiv 2303.11305. It is computed as
W + U diag(max(shift, -sigma)) V^T, which is the same and at init is W exactly, whatever the rounding of U and V.
"""

import torch

from peft_func.functional.model import FunctionalModel
from peft_func.transforms.conv_views import VIEWS, change_of, view_shape
from peft_func.transforms.decomposition import Decompositions
from peft_func.transforms.options import check_choice
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.mapping import Weights
from peft_func.weights.spectral import Spectral


def svdiff(where: Where, *, conv: str = "balanced", name: str = "svdiff") -> Part:
    """Shift the singular values of every selected weight.

    Leaves of `trainable[name][path]`: `shift` [min(h, w)] for a weight that is a matrix [h, w] (for experts [experts,
    min(h, w)]), zero at init; float32 for a half-precision weight. Only the shifts train, and only they are saved.

    The singular vectors are those of the frozen base weight, whatever stands before this part in a chain; the change is
    added to what it receives. They are computed once for each base tensor (in float32 at least), at `adapter.init` or
    the first `apply`, and kept while that tensor lives: up to twice the memory of the adapted weights. A base tensor
    that requires a gradient, or that `torch.func` maps or differentiates, is decomposed in every call, inside the
    graph. A compiled function decomposes in every call too, unless the adapter was applied to the same tensors before,
    outside of it; then it keeps what their values were when it was compiled.

    A matrix with equal singular values has no singular vectors of its own, and one with nearly equal ones has
    ill-conditioned ones. There, what a shift means depends on the library and the device that decomposed the matrix
    (carry such an adapter as merged weights), and the gradient in the base, not in the shifts, does not exist.

    Args:
        where: a selector; only parameters of two dimensions or more are looked at.
        conv: how a convolution's weight is seen as a matrix: `"balanced"`, [out * k0, in / groups * k1 * ...], or
            `"out_as_h"`, [out, in / groups * taps].
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `init` or `apply`, a base weight that is not finite.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Conv2d(3, 64, 7))
        >>> frozen, trainable = pf.bind(pf.svdiff("weight"), model).init(0)
        >>> list(trainable["svdiff"]["weight"]["shift"].shape)
        [21]
    """
    check_choice(name, "conv", conv, VIEWS)

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        layouts = {path: model.layouts[path] for path in paths}
        views = {path: view_shape(layout, conv) for path, layout in layouts.items()}
        bases = Decompositions(name)

        def init(weights: Weights, key: int) -> Tree:
            tree: Tree = {}
            for path, (*batch, h, w) in views.items():
                like = weights.base[path]
                dtype = torch.promote_types(like.dtype, torch.float32)
                tree[path] = {"shift": torch.zeros(*batch, min(h, w), dtype=dtype, device=like.device)}
            return tree

        def apply(tree: Tree, weights: Weights) -> Changes:
            changes = {}
            for path, layout in layouts.items():
                U, sigma, Vt = bases.of(path, weights.base[path], layout, views[path])
                shift = tree[path]["shift"]
                # Not torch.maximum, which lets half a gradient through where relu lets none.
                change = torch.where(sigma + shift > 0, shift, -sigma)
                changes[path] = weights.matrix(path) + change_of(layout, Spectral(U, change, Vt), whole=True)
            return changes

        return Transform(init, apply)

    return Part(where, make, check_name(name), "svdiff", {"conv": conv})
