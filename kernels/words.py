"""bf16 features as 32-bit words of two channels each: half as many elements to load, and one instruction to unpack each."""

import torch
import triton
import triton.language as tl


def as_words(*xs):
    """(xs, pack): int32 views and 2 where all of xs are bf16 and can be seen so, else xs as they are and 1."""
    for x in xs:
        if x.dtype != torch.bfloat16 or x.data_ptr() % 4 or any(n % 2 for n in (x.shape[-1], *x.stride()[:-1])):
            return xs, 1
    return [x.view(torch.int32) for x in xs], 2


@triton.jit
def unpack(words, PACK: tl.constexpr):
    """A tuple of PACK fp32 tensors: the first and the second channel of every word, or the features themselves."""
    if PACK == 2:
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        return (words.to(tl.float32),)


@triton.jit
def pack(parts, PACK: tl.constexpr):
    """The channels in their order again, from a tuple as `unpack` gives it."""
    if PACK == 2:
        return tl.interleave(parts[0], parts[1])
    else:
        return parts[0]
