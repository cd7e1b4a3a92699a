"""bf16 features as 32-bit words of two channels each: one instruction, a shift or a mask, makes fp32 of a channel."""

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
def split(x, PACK: tl.constexpr):
    """Channels [1, n] as `unpack` gives them: PACK tensors [1, n / PACK]."""
    if PACK == 2:
        return x.reshape(1, x.shape[1] // 2, 2).split()
    else:
        return (x,)


@triton.jit
def join(parts, PACK: tl.constexpr):
    """The channels of a tuple that `unpack` gave in their order again."""
    if PACK == 2:
        return tl.interleave(parts[0], parts[1])
    else:
        return parts[0]
