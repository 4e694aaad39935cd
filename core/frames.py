"""Time: frames of a clip, of its latent, and of the tokens that a model makes of that, as one map."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Literal

import torch
from torch import Tensor

How = Literal["maximum", "mean"]
"""What stands for frames that are one: the maximum, so that an edit reaches all of them, or their mean, a share."""

JOIN = {"maximum": lambda frames: frames.amax(0), "mean": lambda frames: frames.mean(0)}


@dataclass(frozen=True)
class FramePattern:
    """Of a VAE: how many frames of a clip each latent frame holds, first those of `head`, then `cycle` repeating.

    It makes `least` latent frames, or a multiple of `group` more; the frames of a clip that are left over it drops.
    """

    head: tuple[int, ...] = ()
    cycle: tuple[int, ...] = (1,)
    least: int = 1
    group: int = 1

    def clip_frames(self, latents: int) -> int:
        """Frames of a clip that so many latent frames hold."""
        return sum(self._sizes(latents))

    @property
    def step(self) -> int:
        """Frames from one length of a clip that is kept whole to the next."""
        return self.clip_frames(self.least + self.group) - self.clip_frames(self.least)

    @property
    def shortest(self) -> int:
        """Frames of the shortest clip that is kept whole."""
        return self.clip_frames(self.least)

    def of(self, latents: int, joined: int = 1) -> "FrameMap":
        """The map of a clip of so many latent frames, of which a model sees `joined` in one token."""
        return FrameMap(self._sizes(latents), self.step - 1, joined)

    def _sizes(self, latents: int) -> tuple[int, ...]:
        return tuple(islice(chain(self.head, cycle(self.cycle)), latents))


@dataclass(frozen=True)
class FrameMap:
    """Of one clip. sizes: frames of the clip that each latent frame holds; spare: further ones that the VAE may have
    dropped; joined: latent frames that are one frame of tokens, in order from the first."""

    sizes: tuple[int, ...]
    spare: int = 0
    joined: int = 1

    @property
    def clip(self) -> int:
        return sum(self.sizes)

    @property
    def latents(self) -> int:
        return len(self.sizes)

    @property
    def tokens(self) -> int:
        return -(-self.latents // self.joined)

    @property
    def compressed(self) -> bool:
        """Whether a latent frame may hold several of the clip."""
        return self.spare > 0

    @property
    def described(self) -> str:
        """The number of its frames, in words."""
        return f"{self.clip}" + (f" ({self.latents} in the latent)" if self.compressed else "")

    def in_latents(self, values: Tensor, how: How, subject: str = "mask: it has") -> Tensor:
        """(1, ...), (latent frames, ...) or one for each frame of the clip -> (latent frames, ...).

        ValueError, which begins with `subject`, for another number. Of frames that the VAE has dropped there is none.
        """
        if self._of_clip(values, subject):
            return torch.stack([JOIN[how](part) for part in values[: self.clip].split(self.sizes)])
        return values.expand(self.latents, *values.shape[1:])

    def in_tokens(self, values: Tensor, how: How, subject: str = "mask: it has") -> Tensor:
        """The same -> (frames of tokens, ...); those of a latent frame weigh in one token as those of another."""
        values = self.in_latents(values, how, subject)
        return values if self.joined == 1 else torch.stack([JOIN[how](part) for part in values.split(self.joined)])

    def in_clip(self, values: Tensor, subject: str = "mask: it has") -> Tensor:
        """The same -> (frames of the clip, ...), of latent frames each as often as it holds frames."""
        if self._of_clip(values, subject):
            return values[: self.clip]
        values = values.expand(self.latents, *values.shape[1:])
        return values.repeat_interleave(torch.tensor(self.sizes, device=values.device), 0)

    def _of_clip(self, values: Tensor, subject: str) -> bool:
        """Whether they are one for each frame of the clip, and not of the latent, or one for all."""
        count = len(values)
        if count in (1, self.latents):
            return False
        if self.clip <= count <= self.clip + self.spare:
            return True
        expected = f"{self.clip} or {self.latents}" if self.compressed else f"{self.clip}"
        raise ValueError(
            f"{subject} {count} frames, the clip has {self.described}; connect one mask for the whole clip, or "
            f"{expected} of them"
        )

    def tokens_of_clip(self, frames: int) -> list[int]:
        """For each frame of the clip, or of the latent, the frame of tokens that it is in. ValueError for another
        number of frames."""
        if frames not in (self.latents, self.clip):
            raise ValueError(
                f"images: they are {frames}, the trajectory's clip has {self.described}; connect the one that was "
                f"encoded for Invert Video"
            )
        sizes: Iterable[int] = self.sizes if frames == self.clip else (1,) * self.latents
        return [latent // self.joined for latent, size in enumerate(sizes) for _ in range(size)]

    def tokens_of(self, latents: Sequence[int]) -> tuple[int, ...]:
        """Frames of tokens that a model makes of these latent frames, in this order: of a context window, say.

        ValueError where latent frames would be one that are not in the whole clip.
        """
        parts = [latents[i : i + self.joined] for i in range(0, len(latents), self.joined)]
        if any(len({frame // self.joined for frame in part}) > 1 for part in parts):
            raise ValueError(
                f"model: it joins {self.joined} latent frames in a token, and the context window begins in the middle "
                f"of one; choose a context length, overlap and stride that {self.joined} divides"
            )
        return tuple(part[0] // self.joined for part in parts)
