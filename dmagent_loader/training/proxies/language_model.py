"""A proxy as the causal language model that `Environment` reads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dmagent_loader.training.proxies.model import ProxyConfig, StackedProxies


class ProxyModel(nn.Module):
    """One proxy as a causal language model.

    Args:
        config: Size of the proxy.
        weights: Its weights, (1, ...) each.
    """

    def __init__(self, config: ProxyConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.proxies = StackedProxies(1, config)
        self.proxies.load_state_dict(dict(weights))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits, (B, T, V); rows are padded on the right, which a causal model does not see."""
        logits = self.proxies.logits(self.proxies.hidden(input_ids[None]))
        return logits.view(*input_ids.shape, -1)
