"""Randomness: one secret key, many independent streams.

Everything that protects somebody (noise, Poisson draws) comes from AES-256 in counter mode under a key of the operating
system. Streams are addressed by (labels, step), not consumed in order, so a resumed run needs no saved generator state.
Keys are never logged, saved with an artifact, or put into a config.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32


@dataclass(frozen=True)
class SecretKey:
    """A 256-bit secret from which the streams of one release are derived.

    Args:
        secret: 32 bytes. Hidden from ``repr`` so that it cannot slip into a log.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a SecretKey holds {KEY_BYTES} bytes, not {len(self.secret)}")

    @staticmethod
    def generate() -> SecretKey:
        """A fresh key from the operating system."""
        return SecretKey(os.urandom(KEY_BYTES))

    def derive(self, *labels: str) -> SecretKey:
        """An independent key for the labels (HKDF-SHA256, RFC 5869).

        Args:
            labels: What the key is for, for example a stage name and a binding digest.

        Returns:
            The derived key; equal labels give an equal key.
        """
        info = b"".join(len(label.encode()).to_bytes(4, "big") + label.encode() for label in labels)
        return SecretKey(HKDF(SHA256(), KEY_BYTES, salt=None, info=b"dpldm/1" + info).derive(self.secret))

    def random_bytes(self, step: int, num_bytes: int) -> bytes:
        """Bytes of the AES-256-CTR key stream of one step.

        Args:
            step: Non-negative index below 2^63; each step has its own 2^64 blocks of 16 bytes.
            num_bytes: How many bytes.
        """
        counter = step.to_bytes(8, "big") + bytes(8)
        encryptor = Cipher(algorithms.AES(self.secret), modes.CTR(counter)).encryptor()
        return encryptor.update(bytes(num_bytes))

    def uint64(self, step: int, size: int) -> np.ndarray:
        """Uniform 64-bit integers, shape [size]."""
        return np.frombuffer(self.random_bytes(step, 8 * size), dtype=np.uint64)

    def normal(self, step: int, size: int) -> np.ndarray:
        """Standard normal float64 draws by Box and Muller (1958), shape [size].

        The radius comes from 53 uniform bits in (0, 1], so tails reach 8.57 standard deviations.
        """
        half = (size + 1) // 2
        uniforms = (self.uint64(step, 2 * half) >> np.uint64(11)).astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((uniforms[:half] + 1.0) * 2.0**-53))
        angle = uniforms[half:] * (2.0 * np.pi * 2.0**-53)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]

    def public_seed(self, step: int) -> int:
        """A 63-bit seed for a library generator whose draws protect nobody (initial weights, diffusion times)."""
        return int(self.uint64(step, 1)[0] >> np.uint64(1))
