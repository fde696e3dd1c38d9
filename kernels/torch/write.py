"""Write tokens into pages, each to a slot that an engine names, quantised where the pages hold e4m3 or int8."""

import torch
from torch import Tensor

from flexmsa.kernels.torch import fp8, int8

_LARGEST = 448.0


def write_pages(
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    slots: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    pages_index_k: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    index_k_scale: Tensor | None,
    factors: tuple[float, float, float],
) -> None:
    """Write k, v [1,Hkv,T,D], index_k [1,1,T,Di] to ``slots`` [T] of pages [num_pages,H,page_size,D].

    Slot s is place s % page_size of page s // page_size; slots that are not there are skipped. e4m3 pages with scales
    [num_pages,H,page_size] get one for each vector, as int8 pages do; without scales, numbers are multiplied by their
    factor, and those beyond e4m3's range become its largest.
    """
    num_pages, _, page_size, _ = pages_k.shape
    token = ((slots >= 0) & (slots < num_pages * page_size)).nonzero()[:, 0]
    slot = slots[token].long()
    page, key = slot // page_size, slot % page_size
    for new, pages, scale, factor in (
        (k, pages_k, k_scale, factors[0]),
        (v, pages_v, v_scale, factors[1]),
        (index_k, pages_index_k, index_k_scale, factors[2]),
    ):
        vectors = new[0, :, token].transpose(0, 1)
        if scale is not None:
            vectors, scale[page, :, key] = int8.quantizer(pages)(vectors)
        elif fp8.is_e4m3(pages):
            vectors = (vectors.to(torch.float32) * factor).clamp(-_LARGEST, _LARGEST).to(pages.dtype)
        # Not every device copies e4m3 numbers by index.
        target = pages.view(torch.uint8) if fp8.is_e4m3(pages) else pages
        target[page, :, key] = vectors.view(torch.uint8) if fp8.is_e4m3(pages) else vectors.to(pages.dtype)
