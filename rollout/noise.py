"""Counter-based noise: every draw is a function of (sample seed, output position, token id) and of nothing else.

A trajectory therefore does not depend on batch composition, slot, preemption, restarts or tensor-parallel rank, and
the swap of two nearly equal candidates changes no other draw. Keyed by token id, never by candidate rank.

    row  = mix(mix(seed + G) ^ position * G)          G, M1, M2: the splitmix64 constants, arithmetic modulo 2^64
    word = mix(row ^ (id + 1) * M1)                   further words of the same draw: mix(word ^ stream * M2)
    u    = ((word >> 12) + 1/2) / 2^52                exact in fp64, strictly inside (0, 1)

The logarithms are taken in fp64 and the result is rounded once to fp32; on other hardware a logarithm may differ in
its last fp64 bit, which changes an fp32 draw only where it sits on a rounding boundary. No host synchronisation and
no data-dependent shapes: safe inside a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_M1 = _signed(0xBF58476D1CE4E5B9)
_M2 = _signed(0x94D049BB133111EB)

GAMMA_ROUNDS = 8
"""Proposals per gamma draw; one is rejected with probability below 0.049, all of them below 4e-11."""
_FP32_TINY = torch.finfo(torch.float32).tiny


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix(word: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea & Flood 2014), a bijection of 64-bit words."""
    word = (word ^ _shift_right(word, 30)) * _M1
    word = (word ^ _shift_right(word, 27)) * _M2
    return word ^ _shift_right(word, 31)


def _uniform(word: Tensor) -> Tensor:
    """fp64 in (0, 1) from the upper 52 bits; 53 would round up to exactly 1 once in 2^53 draws."""
    return (_shift_right(word, 12).to(torch.float64) + 0.5) * 2.0**-52


@dataclass(frozen=True)
class CounterNoise:
    """The draws of a batch of rows, as a callable that `sample_soft_tokens` takes.

    `seed` [B] int64 (one per trajectory, stored with it) and `position` [B] int64 (output position, 0 for the first
    generated token). Calling it gives the draws of the default family, Gumbel.
    """

    seed: Tensor
    position: Tensor
    _row: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        row = _mix(self.seed.to(torch.int64) + _GOLDEN)
        object.__setattr__(self, "_row", _mix(row ^ (self.position.to(torch.int64) * _GOLDEN)))

    def _word(self, ids: Tensor) -> Tensor:
        """[B, K] ids -> [B, K] int64 of 64 random bits."""
        return _mix(self._row[:, None] ^ ((ids.to(torch.int64) + 1) * _M1))

    def __call__(self, ids: Tensor) -> Tensor:
        """Gumbel(0, 1) draws [B, K] fp32, between -3.6 and 36.8, for token ids [B, K]."""
        return self.gumbel(ids)

    def gumbel(self, ids: Tensor) -> Tensor:
        """Gumbel(0, 1) draws [B, K] fp32."""
        return (-torch.log(-torch.log(_uniform(self._word(ids))))).to(torch.float32)

    def normal(self, ids: Tensor) -> Tensor:
        """Standard normal draws [B, K] fp32 (inverse distribution function)."""
        return torch.special.ndtri(_uniform(self._word(ids))).to(torch.float32)

    def gamma(self, ids: Tensor, concentration: Tensor) -> Tensor:
        """Gamma(concentration, 1) draws [B, K] fp32, at least the smallest normal fp32.

        Marsaglia & Tsang (2000) with a fixed number of proposals for `concentration` + 1, brought down by
        U^(1 / concentration), so that tiny concentrations (improbable candidates) stay exact.
        """
        shape = concentration.to(torch.float64)
        word = self._word(ids)
        streams = torch.arange(1, 2 * GAMMA_ROUNDS + 1, device=ids.device, dtype=torch.int64)
        uniforms = _uniform(_mix(word[..., None] ^ (streams * _M2)))
        normals = torch.special.ndtri(uniforms[..., :GAMMA_ROUNDS])
        d = shape + 1.0 - 1.0 / 3.0
        v = (1.0 + normals * torch.rsqrt(9.0 * d)[..., None]) ** 3
        # log of a non-positive v is NaN, and NaN comparisons are false: such a proposal is rejected.
        bound = 0.5 * normals * normals + d[..., None] * (1.0 - v + torch.log(v))
        accepted = (torch.log(uniforms[..., GAMMA_ROUNDS:]) < bound).to(torch.uint8)
        first = accepted.argmax(dim=-1, keepdim=True)
        boosted = d * v.gather(-1, first).squeeze(-1) * torch.exp(torch.log(_uniform(word)) / shape)
        return boosted.to(torch.float32).clamp_min(_FP32_TINY)


def gumbel_log_density(noise: Tensor) -> Tensor:
    """log density -e - exp(-e) of Gumbel(0, 1) draws, elementwise."""
    return -noise - torch.exp(-noise)


def normal_log_density(noise: Tensor) -> Tensor:
    """log density of standard normal draws, elementwise."""
    return -0.5 * (noise * noise + math.log(2.0 * math.pi))
