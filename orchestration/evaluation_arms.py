"""The arms of an evaluation: ways to decode one checkpoint, and what makes them comparable.

| arm      | thinking | differs from `soft` in                                                            |
|----------|----------|-----------------------------------------------------------------------------------|
| soft     | soft     | -                                                                                 |
| discrete | discrete | ordinary sampling of one token per step                                           |
| argmax   | soft     | every mixture is replaced by its heaviest candidate, same noise: does it matter?  |
| mean     | soft     | the mixture without noise: candidates weigh what they are probable                |

Matched decoding (the default): temperature, top-k and top-p of the recipe's thinking hold for every arm and for the
answer. The paper compares arms at different settings; `own` does that too. Several temperatures make one arm each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestration.config import Config, ConfigError
from rollout.engine_spec import MIN_ANSWER_TEMPERATURE
from rollout.request import RequestSettings

ARM_NAMES = ("soft", "discrete", "argmax", "mean")
ARM_MIXTURES = {"argmax": {"gumbel_temperature": 0.0}, "mean": {"gumbel_temperature": 1.0, "noise_scale": 0.0}}
"""What makes an arm's mixture another one than `soft`'s. Without noise, softmax(log p / 1) = p."""

Decoding = Literal["matched", "own"]


@dataclass(frozen=True, slots=True)
class EvaluationArm:
    """One way to decode."""

    name: str
    thinking: Literal["soft", "discrete"]
    settings: RequestSettings

    def record(self, config: Config) -> dict[str, Any]:
        """Everything about decoding that the rows of this arm depend on."""
        sampling = config.sampling
        stop = sampling.entropy_stop
        of_soft_tokens = {
            "noise": sampling.noise,
            "noise_clip": sampling.noise_clip and list(sampling.noise_clip),
            "log_epsilon": sampling.log_epsilon,
            "censor_delta": config.censor_delta,
            "entropy_stop": stop and [stop, sampling.entropy_stop_steps],
        }
        known = {"thinking": self.thinking, **asdict(self.settings)}
        return known | (of_soft_tokens if self.thinking == "soft" else {})


def make_arms(
    names: Sequence[str], config: Config, decoding: Decoding, temperatures: Sequence[float] = ()
) -> list[EvaluationArm]:
    """The arms to run; raises `ConfigError` for a name that is none."""
    unknown = [name for name in names if name not in ARM_NAMES]
    if unknown or not names:
        raise ConfigError(f"--arms {','.join(names)}: choose from {', '.join(ARM_NAMES)}")
    if "mean" in names and config.sampling.noise not in ("gumbel", "none"):
        raise ConfigError(f"--arms mean with sampling.noise={config.sampling.noise}: only gumbel noise can be left out")
    arms = []
    for temperature in temperatures or (None,):
        for name in dict.fromkeys(names):
            label = name if temperature is None else f"{name}@{temperature:g}"
            arms.append(_arm(name, label, config, decoding, temperature))
    return arms


def _arm(name: str, label: str, config: Config, decoding: Decoding, temperature: float | None) -> EvaluationArm:
    sampling, answer = config.sampling, config.sampling.answer
    thinking_temperature = sampling.temperature if temperature is None else temperature
    if decoding == "matched":
        answer_settings = (thinking_temperature, sampling.top_p, sampling.top_k)
    else:
        answer_settings = (answer.temperature if temperature is None else temperature, answer.top_p, answer.top_k)
    if 0 < answer_settings[0] < MIN_ANSWER_TEMPERATURE:
        raise ConfigError(
            f"arm {label}: its answers would have temperature {answer_settings[0]:g}, at which vLLM draws as at "
            f"{MIN_ANSWER_TEMPERATURE}; set sampling.temperature (--decoding own: sampling.answer.temperature) or "
            "--temperatures to 0 or at least that"
        )
    mixture = {"gumbel_temperature": sampling.gumbel_temperature, "noise_scale": sampling.noise_scale}
    return EvaluationArm(
        label,
        "discrete" if name == "discrete" else "soft",
        RequestSettings(
            **(mixture | ARM_MIXTURES.get(name, {})),
            temperature=thinking_temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=0.0 if decoding == "matched" else sampling.min_p,
            max_new_tokens=sampling.max_new_tokens,
            thinking_budget=config.thinking_budget,
            answer_temperature=answer_settings[0],
            answer_top_p=answer_settings[1],
            answer_top_k=answer_settings[2],
        ),
    )
