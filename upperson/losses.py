"""Losses over a batch of matching image and text features.

Shapes: N pairs, E embedding width, C identities of the training split. Every loss is a scalar
float32 and takes the features of the *whole* batch, of all processes. A matrix NN has texts in
rows and images in columns.

    sdm   similarity distribution matching (arXiv 2504.10084, eq. 18-20), the method's only loss
    asdm  adaptive SDM (arXiv 2509.13754): rows whose best match is wrong weigh more
    tal   triplet alignment (RDE, arXiv 2308.09911): a margin to the soft maximum of all negatives
    itc   symmetric InfoNCE (CLIP), the i-th text belonging to the i-th image alone
    cmpm  cross-modal projection matching (Zhang and Lu, ECCV 2018)
    id    identity classification with one classifier for both modalities
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upperson_rt.errors import UsageError
from upperson_rt.printable import safe_repr
from upperson_rt.strict import suggestion

LOSSES = ("sdm", "asdm", "tal", "itc", "cmpm", "id")

TEMPERATURE = 0.02
"""tau of the paper, fixed: the logit scale is 50. A run may have another (``temperature``)."""

EPSILON = 1e-8
"""Keeps the logarithm of a zero target finite; it is added inside the logarithm only."""

GAP_WEIGHT = 10.0  # alpha of adaptive SDM, as in its authors' code.

TAL_MARGIN = 0.1
TAL_TEMPERATURE = 0.015  # m and tau of RDE.

_NO_MATCH = -1e4
"""A logit that a softmax gives no mass, and whose gradient is a number even where all are so."""


def loss_names(text: str) -> tuple[str, ...]:
    """Split a ``+``-joined list of losses; UsageError for an unknown or repeated one."""
    names = tuple(text.split("+"))
    for name in names:
        if name not in LOSSES:
            raise UsageError(
                f"loss {safe_repr(name)} is unknown: {suggestion(name, LOSSES)}",
                code="loss_unknown",
                loss=name,
            )
    if len(set(names)) < len(names):
        raise UsageError(
            f"loss {safe_repr(text)} names a loss twice: name each once",
            code="loss_repeated",
            loss=text,
        )
    return names


class Objective(nn.Module):
    """The plain sum of the chosen losses; holds the classifier if ``id`` is one of them.

    E is ``embed_dim``, C is ``identities``; ``temperature`` is that of sdm, asdm, itc and wrong
    captions.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        embed_dim: int,
        identities: int,
        temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__()
        self.names = names
        self.temperature = temperature
        self.classifier: nn.Linear | None = None
        if "id" in names:
            self.classifier = nn.Linear(embed_dim, identities)
            nn.init.normal_(self.classifier.weight, std=0.001)
            nn.init.zeros_(self.classifier.bias)

    def forward(
        self, image_NE: Tensor, text_NE: Tensor, labels_N: Tensor, fits_NN: Tensor | None = None
    ) -> Tensor:
        """Sum the losses of features that are not unit norm; labels are 0 to C - 1.

        ``fits_NN`` is bool: which images a text also describes, though written about another
        person; sdm, asdm and tal count those as right, too.
        """
        right_NN = same_identity(labels_N)
        if fits_NN is not None:
            right_NN = right_NN | fits_NN
        tau = self.temperature
        image_NE, text_NE = image_NE.float(), text_NE.float()
        unit_image_NE, unit_text_NE = F.normalize(image_NE, dim=-1), F.normalize(text_NE, dim=-1)
        total = image_NE.new_zeros(())
        for name in self.names:
            match name:
                case "sdm":
                    total = total + sdm_loss(unit_image_NE, unit_text_NE, right_NN, tau)
                case "asdm":
                    total = total + asdm_loss(unit_image_NE, unit_text_NE, right_NN, tau)
                case "tal":
                    total = total + tal_loss(unit_image_NE, unit_text_NE, right_NN)
                case "itc":
                    total = total + itc_loss(unit_image_NE, unit_text_NE, tau)
                case "cmpm":
                    total = total + cmpm_loss(image_NE, text_NE, same_identity(labels_N))
                case "id" if self.classifier is not None:
                    total = total + id_loss(self.classifier, image_NE, text_NE, labels_N)
        return total


def same_identity(labels_N: Tensor) -> Tensor:
    """Return which text and image are of one person, bool [N, N]."""
    return labels_N[:, None] == labels_N[None, :]


def sdm_loss(
    image_NE: Tensor, text_NE: Tensor, right_NN: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """Sum of KL(p || Q) from text to image and from image to text.

    p is the softmax over the batch of cosine / tau; Q shares its mass equally among all items that
    are right. Features are unit norm. ``right_NN`` is bool: which image is right for which text,
    the own one and others of the same identity; each row and each column has one.
    """
    logits_NN = text_NE.float() @ image_NE.float().T / temperature
    to_image_N = _divergence(logits_NN, _log_target(right_NN))
    return (to_image_N + _divergence(logits_NN.T, _log_target(right_NN.T))).mean()


def asdm_loss(
    image_NE: Tensor, text_NE: Tensor, right_NN: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """SDM, a row weighted by 1 + alpha (best cosine - best cosine that is right).

    The weight is differentiated, too, as in the authors' code: where the softmax is saturated at a
    wrong answer, and SDM has no gradient, it pulls the pair together and the wrong answer away.
    Arguments as for `sdm_loss`.
    """
    cosine_NN = text_NE.float() @ image_NE.float().T
    total = cosine_NN.new_zeros(())
    for row_NN, right in ((cosine_NN, right_NN), (cosine_NN.T, right_NN.T)):
        gap_N = row_NN.amax(dim=1) - row_NN.masked_fill(~right, _NO_MATCH).amax(dim=1)
        divergence_N = _divergence(row_NN / temperature, _log_target(right))
        total = total + ((1 + GAP_WEIGHT * gap_N) * divergence_N).mean()
    return total


def tal_loss(image_NE: Tensor, text_NE: Tensor, right_NN: Tensor) -> Tensor:
    """Sum of [m - S + tau log sum_k exp(cosine_k / tau)]+ over the batch, both directions.

    k runs over the items that are wrong; S is the mean cosine to those that are right, weighted by
    their softmax at tau, which is not differentiated. A sum, as published: with Adam's large
    epsilon the size of a gradient matters. Arguments as for `sdm_loss`.
    """
    cosine_NN = text_NE.float() @ image_NE.float().T
    total = cosine_NN.new_zeros(())
    for row_NN, right in ((cosine_NN, right_NN), (cosine_NN.T, right_NN.T)):
        logits_NN = row_NN / TAL_TEMPERATURE
        weight_NN = logits_NN.detach().masked_fill(~right, _NO_MATCH).softmax(dim=1)
        positive_N = (weight_NN * row_NN).sum(dim=1)
        negative_N = TAL_TEMPERATURE * logits_NN.masked_fill(right, _NO_MATCH).logsumexp(dim=1)
        total = total + (TAL_MARGIN - positive_N + negative_N).clamp(min=0).sum()
    return total


def itc_loss(image_NE: Tensor, text_NE: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Mean of both directions' cross entropy; unit-norm features."""
    logits_NN = text_NE @ image_NE.T / temperature
    target_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return (F.cross_entropy(logits_NN, target_N) + F.cross_entropy(logits_NN.T, target_N)) / 2


def cmpm_loss(image_NE: Tensor, text_NE: Tensor, right_NN: Tensor) -> Tensor:
    """Sum of KL(p || Q) of scalar projections: a feature, with its length, on unit features.

    The target is the row normalised to sum 1, as CMPM defines it, see
    ``docs/explanation/decisions.md``.
    """
    onto_text_NN = image_NE @ F.normalize(text_NE, dim=-1).T
    onto_image_NN = text_NE @ F.normalize(image_NE, dim=-1).T
    to_text_N = _divergence(onto_text_NN, _log_target(right_NN.T))
    return (to_text_N + _divergence(onto_image_NN, _log_target(right_NN))).mean()


def id_loss(classifier: nn.Module, image_NE: Tensor, text_NE: Tensor, labels_N: Tensor) -> Tensor:
    """Mean of both modalities' cross entropy over the identities; features as they are."""
    image = F.cross_entropy(classifier(image_NE), labels_N)
    return (image + F.cross_entropy(classifier(text_NE), labels_N)) / 2


def wrong_caption_loss(
    image_NE: Tensor, text_NE: Tensor, wrong_NE: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """Mean cross entropy of each image between its caption and a wrong version of it.

    Features need not be unit norm. A wrong version that equals the caption gives no gradient.
    """
    image_NE, text_NE, wrong_NE = (
        F.normalize(features.float(), dim=-1) for features in (image_NE, text_NE, wrong_NE)
    )
    lead_N = (image_NE * (text_NE - wrong_NE)).sum(dim=1)
    return F.softplus(-lead_N / temperature).mean()


def _log_target(right_NN: Tensor) -> Tensor:
    return torch.log(right_NN / right_NN.sum(dim=1, keepdim=True) + EPSILON)


def _divergence(logits_NN: Tensor, log_target_NN: Tensor) -> Tensor:
    log_p_NN = logits_NN.log_softmax(dim=1)
    return (log_p_NN.exp() * (log_p_NN - log_target_NN)).sum(dim=1)
