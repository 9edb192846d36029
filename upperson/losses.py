"""Losses over a batch of matching image and text features.

Shapes: N pairs, E embedding width, C identities of the training split. Every loss is a scalar
float32 and takes the features of the *whole* batch, of all processes.

    sdm   similarity distribution matching (arXiv 2504.10084, eq. 18-20), the method's only loss
    itc   symmetric InfoNCE (CLIP), the i-th text belonging to the i-th image alone
    cmpm  cross-modal projection matching (Zhang and Lu, ECCV 2018)
    id    identity classification with one classifier for both modalities
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upperson_rt.errors import UsageError
from upperson_rt.strict import suggestion

LOSSES = ("sdm", "itc", "cmpm", "id")

TEMPERATURE = 0.02
"""tau of the paper, fixed: the logit scale is 50."""

EPSILON = 1e-8
"""Keeps the logarithm of a zero target finite; it is added inside the logarithm only."""


def loss_names(text: str) -> tuple[str, ...]:
    """Split a ``+``-joined list of losses; UsageError for an unknown or repeated one."""
    names = tuple(text.split("+"))
    for name in names:
        if name not in LOSSES:
            raise UsageError(f"loss '{name}' is unknown: {suggestion(name, LOSSES)}")
    if len(set(names)) < len(names):
        raise UsageError(f"loss '{text}' names a loss twice: every one counts once")
    return names


class Objective(nn.Module):
    """The plain sum of the chosen losses; holds the classifier if ``id`` is one of them.

    Args:
        names: Losses, see the module.
        embed_dim: Width E of the features.
        identities: Number C of identities; labels are 0 to C - 1.
    """

    def __init__(self, names: tuple[str, ...], embed_dim: int, identities: int) -> None:
        super().__init__()
        self.names = names
        self.classifier: nn.Linear | None = None
        if "id" in names:
            self.classifier = nn.Linear(embed_dim, identities)
            nn.init.normal_(self.classifier.weight, std=0.001)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, image_NE: Tensor, text_NE: Tensor, labels_N: Tensor) -> Tensor:
        """Sum the losses of features that are not unit norm, [N, E] each, with labels [N]."""
        image_NE, text_NE = image_NE.float(), text_NE.float()
        unit_image_NE, unit_text_NE = F.normalize(image_NE, dim=-1), F.normalize(text_NE, dim=-1)
        total = image_NE.new_zeros(())
        for name in self.names:
            match name:
                case "sdm":
                    total = total + sdm_loss(unit_image_NE, unit_text_NE, labels_N)
                case "itc":
                    total = total + itc_loss(unit_image_NE, unit_text_NE)
                case "cmpm":
                    total = total + cmpm_loss(image_NE, text_NE, labels_N)
                case "id" if self.classifier is not None:
                    total = total + id_loss(self.classifier, image_NE, text_NE, labels_N)
        return total


def sdm_loss(image_NE: Tensor, text_NE: Tensor, labels_N: Tensor) -> Tensor:
    """Sum of KL(p || Q) from text to image and from image to text.

    p is the softmax over the batch of cosine / tau; Q shares its mass equally among all items of
    the same identity. Features are unit norm, the i-th text belonging to the i-th image.
    """
    logits_NN = text_NE.float() @ image_NE.float().T / TEMPERATURE
    log_target_NN = _log_target(labels_N)
    return _divergence(logits_NN, log_target_NN) + _divergence(logits_NN.T, log_target_NN)


def itc_loss(image_NE: Tensor, text_NE: Tensor) -> Tensor:
    """Mean of both directions' cross entropy; unit-norm features, SDM's temperature."""
    logits_NN = text_NE @ image_NE.T / TEMPERATURE
    target_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return (F.cross_entropy(logits_NN, target_N) + F.cross_entropy(logits_NN.T, target_N)) / 2


def cmpm_loss(image_NE: Tensor, text_NE: Tensor, labels_N: Tensor) -> Tensor:
    """Sum of KL(p || Q) of scalar projections: a feature, with its length, on unit features.

    The target is the row normalised to sum 1, as CMPM defines it (see ``docs/decisions.md``).
    """
    log_target_NN = _log_target(labels_N)
    onto_text_NN = image_NE @ F.normalize(text_NE, dim=-1).T
    onto_image_NN = text_NE @ F.normalize(image_NE, dim=-1).T
    return _divergence(onto_text_NN, log_target_NN) + _divergence(onto_image_NN, log_target_NN)


def id_loss(classifier: nn.Module, image_NE: Tensor, text_NE: Tensor, labels_N: Tensor) -> Tensor:
    """Mean of both modalities' cross entropy over the identities; features as they are."""
    image = F.cross_entropy(classifier(image_NE), labels_N)
    return (image + F.cross_entropy(classifier(text_NE), labels_N)) / 2


def _log_target(labels_N: Tensor) -> Tensor:
    same_NN = (labels_N[:, None] == labels_N[None, :]).float()
    return torch.log(same_NN / same_NN.sum(dim=1, keepdim=True) + EPSILON)


def _divergence(logits_NN: Tensor, log_target_NN: Tensor) -> Tensor:
    log_p_NN = logits_NN.log_softmax(dim=1)
    return (log_p_NN.exp() * (log_p_NN - log_target_NN)).sum(dim=1).mean()
