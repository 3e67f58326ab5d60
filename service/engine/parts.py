"""The parts of a model, as cost estimates distinguish them."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from service.engine.base import DrawRequest
from service.engine.costs import Part
from service.engine.plan import Plan
from weights.families import TextToImage
from weights.modules import architecture


@dataclass(frozen=True)
class Parts:
    """The parts that an image's calls are made to."""

    network: Part
    decoder: Part
    text: Part

    def work(self, plan: Plan, request: DrawRequest) -> list[tuple[Part, int]]:
        """Approximately how many rows of each part a request takes, for `Costs.predict`."""
        pictures = len(request.seeds)
        shown = min(request.previews, plan.steps) if request.exact_previews else 0
        return [
            (self.text, 1 + plan.needs_uncond),
            (self.network, pictures * plan.evaluations),
            (self.decoder, pictures * (1 + shown)),
        ]


UNKNOWN = Parts(network=Part("network", "", ()), decoder=Part("decoder", "", ()), text=Part("text", "", ()))
"""For a model that is not in memory: `Costs` assumes the most expensive parts that it knows."""
_known: WeakKeyDictionary[TextToImage, Parts] = WeakKeyDictionary()


def parts_of(model: TextToImage) -> Parts:
    """The parts of a model in memory."""
    if model not in _known:
        shape = model.latent_shape()
        # Text encoder and decoder belong together: the architecture of everything but the network distinguishes both
        # from those of another base.
        rest = " ".join(architecture(each) for each in model.components().values() if each is not model.network)
        _known[model] = Parts(
            network=Part("network", architecture(model.network), shape),
            decoder=Part("decoder", rest, shape),
            text=Part("text", rest, ()),
        )
    return _known[model]
