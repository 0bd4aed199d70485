"""Matrix products by oneDNN: the same numbers, and gradients as ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import linear

from model_adapter.models import products
from model_adapter.models.products import Linear, use_fast_products

onednn = pytest.mark.skipif(not products._is_right(), reason="torch has no such product here")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What the machine is found to be is forgotten before and after."""
    products.pays.cache_clear()
    yield
    products.pays.cache_clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of products that oneDNN was asked for, on a machine where it pays."""
    rows: list[int] = []
    product = products._product

    def counted(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows.append(input.numel() // weight.shape[1])
        return product(input, weight, bias)

    monkeypatch.setattr(products, "pays", lambda: True)
    monkeypatch.setattr(products, "_product", counted)
    return rows


@onednn
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_onednn_is_that_of_torch(bias: bool, taken: list[int]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 24, bias=bias)
    rows = torch.randn(3, 5, 40)
    usual = linear(rows, layer.weight, layer.bias)
    assert use_fast_products(torch.nn.Sequential(layer))
    assert isinstance(layer, Linear)
    with torch.no_grad():
        torch.testing.assert_close(layer(rows), usual.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(rows.mT.contiguous().mT), usual.detach())
    assert taken == [15, 15]


@onednn
def test_gradients_single_tokens_and_other_dtypes_are_torchs_own(taken: list[int]) -> None:
    layer = torch.nn.Linear(40, 24)
    use_fast_products(torch.nn.Sequential(layer))
    rows = torch.randn(16, 40, requires_grad=True)
    layer(rows).sum().backward()
    torch.testing.assert_close(rows.grad, layer.weight.sum(0).expand(16, -1))
    with torch.no_grad():
        layer(rows[:1])
        layer.to(torch.bfloat16)(rows.to(torch.bfloat16))
    assert taken == []


def test_a_processor_of_another_maker_keeps_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_processor", lambda: "vendor_id : GenuineIntel")
    layer = torch.nn.Linear(40, 24)
    assert not use_fast_products(torch.nn.Sequential(layer))
    assert type(layer) is torch.nn.Linear


def test_a_product_that_torch_no_longer_has_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(products, "_processor", lambda: "vendor_id : AuthenticAMD")
    monkeypatch.setattr(products, "_product", gone)
    assert not products.pays()
