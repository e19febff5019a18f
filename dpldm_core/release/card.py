"""The data card (README.md) of a bundle, for a reader who decides whether the data may be used.

Everything in it comes from the privacy report, public parts of the configuration and what the caller names: no number
that was measured on private data, but for an accuracy that a mechanism of the release paid for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpldm_core.privacy.report import PrivacyReport, round_up
from dpldm_core.release.metrics import ReleasedMetrics, in_words

_TEMPLATE = """\
---
{front_matter}
---

# {title}: synthetic images

{num_samples} images drawn by a model; none of them is a photograph or scan of anything. They imitate a data set that
was treated as private, and the whole chain that made them keeps the promise below.

![The first images of each class, not selected](samples.png)

## The promise

> {statement}

- **Compared with what.** Imagine a second world with the same private data {change}.
  Whatever anybody concludes from this release, they would have concluded almost as likely there.
- **Epsilon = {epsilon:.3f}** (at most {target:g} was asked for) says how almost: no outcome is more than {factor}
  times as likely in one world as in the other. Somebody who held both worlds for equally likely can, in the worst case,
  become {certainty} sure of one. Up to 1 is a strong guarantee, up to 10 a reasonable one, above 10 a weak one
  (tiers of Ponomareva et al., 2023).
- **Delta = {delta!r}** is, roughly, the probability with which that bound may fail. It is a public choice.
- **Whose privacy.** The unit of privacy is {unit}. Under REPLACE_ONE ({unit} exchanged for any other) the
  same release costs epsilon = {replace_one:.3f}.
- **For how long.** For ever, against anybody, whatever else they know or will learn.

### What is not promised

{not_covered}

### What the promise adds up from

| stage | mechanism | noise multiplier |
|---|---|---|
{stages}

The noise multiplier is the noise's standard deviation over the most that one unit of privacy can change. The costs of
the rows do not simply add up: epsilon is computed over all of them together ({accountant}).
{audit}
### What is treated as public

| fact | value | where it comes from |
|---|---|---|
{public_facts}
{metrics}
## Check it yourself

```
python -m dpldm_core.release.verify path/to/{release_id}
```

recomputes epsilon from the mechanisms in `privacy_report.json` alone, compares these with the stages, rates and steps
of `config.json` and the SHA-256 of every file with `manifest.json`, and says what is wrong if anything was changed. It
needs no private data and no GPU. It ends with the SHA-256 of the manifest: compare that with what the steward tells
you, for whoever rewrites all files can rewrite their list too.

## Load it

```python
import io
import pandas as pd
from PIL import Image

frame = pd.read_parquet("synthetic")  # columns: {columns}
image = Image.open(io.BytesIO(frame["image"][0]["bytes"]))
```

```python
from datasets import load_dataset

data = load_dataset("parquet", data_files="synthetic/*.parquet", split="train")
```
{classes}
`model/` holds the public networks as safetensors. More images can be drawn from them at no further privacy cost.

## How it was made

{how}

Release `{release_id}`{parent}, preset `{preset}`, ledger entry `{entry}`; every setting is in `config.json`.{made_by}

## Limits

- Noise protects the rare before the common: small groups are drawn less faithfully than large ones.
- A synthetic image may be wrong for its label. Do not diagnose, identify or decide about a person with it.
- Results on this data are a guide. Confirm what matters on the real data, where its steward allows that.

## Licence

The promise above is about privacy. It grants no right to use: the terms of the original data and of its steward apply.
The software that made the data is under Apache-2.0.
"""
_METHODS = {
    "dp_sgd": """\
A two-stage differentially private latent diffusion model (Ge, Zhang and Sun, 2024, *Differential Privacy Data Synthesis
Method Based on Latent Diffusion Model*, Computer Science 51(3)). An autoencoder is trained with DP-SGD (Abadi et al.,
2016), the private images are encoded, and a diffusion model (Karras et al., 2022) is trained on the latents, again with
DP-SGD. New latents are drawn from the diffusion model and decoded. Where the table above has the stage
`train_teacher`, a classifier names the class of each: such images taught it first, and private ones then taught its
last layers, with DP-SGD; where it has `train_first_teacher`, one like it named the images that taught it. Without these
a classifier that learnt from samples of released Gaussians alone names them, if `model/` has one. Each stage
adds secret noise to what it learns; one that the table does not have learns nothing from private images. Images are
drawn for all classes alike, whatever the shares of these among the private images; `model/denoiser.safetensors` holds
the shares as one of the stages above measured them, with its noise.""",
    "noised_latents": """\
A two-stage differentially private latent diffusion model (after Ge, Zhang and Sun, 2024, *Differential Privacy Data
Synthesis Method Based on Latent Diffusion Model*, Computer Science 51(3)). An autoencoder is trained with DP-SGD (Abadi
et al., 2016). Each record's latent is then clipped and released with its own noise; the diffusion model (Karras et al.,
2022) sees only those noisy latents, so training it costs nothing more. New latents are drawn from it and decoded.""",
}
_CHANGE = {
    "ADD_OR_REMOVE_ONE": "but for {unit}, added or removed",
    "REPLACE_ONE": "but for {unit}, replaced by any other",
}


def render_card(
    report: PrivacyReport,
    config: Mapping[str, Any],
    *,
    dataset_title: str,
    num_samples: int,
    class_names: Sequence[str],
    audit: Mapping[str, Any] | None = None,
    metrics: ReleasedMetrics | None = None,
) -> str:
    """README.md of a bundle, with Hugging Face front matter.

    Args:
        report: The privacy report of the release.
        config: The resolved configuration; only ``epsilon`` and ``preset`` are shown.
        dataset_title: Public name of the data, for people.
        num_samples: Synthetic images in the bundle.
        class_names: Public class names; empty when there are no labels.
        audit: Fields of an :class:`AuditNote`, if there was an audit on public data.
        metrics: The accuracy that the release paid for, if it did.
    """
    title = " ".join(dataset_title.split())
    facts = [(name, _value(fact.value), fact.origin) for name, fact in report.public_facts.items()]
    numbered = ", ".join(f"{k} = {_cell(name)}" for k, name in enumerate(class_names))
    return _TEMPLATE.format(
        front_matter=_front_matter(title, num_samples, bool(class_names)),
        title=title,
        num_samples=f"{num_samples:,}",
        statement=report.statement,
        **_in_words(report),
        epsilon=round_up(report.epsilon),
        target=float(config["epsilon"]),
        delta=report.delta,
        unit=report.unit_of_privacy,
        replace_one=round_up(report.epsilon_replace_one),
        not_covered="\n".join(f"- {line}" for line in report.not_covered),
        stages=_rows([(e.stage, *_mechanism(e.event)) for e in report.events]),
        accountant=report.accountant.get("published", "see privacy_report.json"),
        audit=_audit(audit),
        public_facts=_rows(facts or [("none", "", "")]),
        metrics=f"\n## How useful it is\n\n{in_words(metrics)}\n" if metrics else "",
        release_id=report.release_id,
        columns="image, label" if class_names else "image",
        classes=f"\nClasses: {numbered}.\n" if class_names else "",
        how=_METHODS[report.latent_mechanism],
        parent=f", sampled again from `{report.parent_release_id}`" if report.parent_release_id else "",
        preset=config["preset"],
        entry=report.ledger.entry,
        made_by=_made_by(report.software),
    )


def _made_by(software: Mapping[str, str]) -> str:
    """The code, in a line of its own."""
    versions = [f"{name} {value}" for name, value in software.items() if name != "code_digest"]
    if "code_digest" not in software:
        return ""
    return f"\nMade by dpldm, SHA-256 of its sources {software['code_digest']}, with {', '.join(versions)}."


def _front_matter(title: str, num_samples: int, labelled: bool) -> str:
    """Hugging Face dataset metadata. JSON strings are valid YAML."""
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    size = next((name for bound, name in bounds if num_samples < bound), "n>1M")
    task = "image-classification" if labelled else "unconditional-image-generation"
    lines = [
        f"pretty_name: {json.dumps(title + ' (synthetic, differentially private)', ensure_ascii=False)}",
        "license: other",
        "tags: [synthetic, differential-privacy, latent-diffusion]",
        f"task_categories: [{task}]",
        f"size_categories: [{json.dumps(size)}]",
        "configs:",
        "  - config_name: default",
        '    data_files: "synthetic/*.parquet"',
    ]
    return "\n".join(lines)


def _in_words(report: PrivacyReport) -> dict[str, str]:
    """What epsilon and the relation mean, for somebody who has not met them."""
    epsilon = round_up(report.epsilon)
    sure = 1 / (1 + math.exp(-min(epsilon, 700.0)))  # posterior of two equally likely worlds, delta aside
    return {
        "change": _CHANGE[report.neighboring_relation].format(unit=report.unit_of_privacy),
        "factor": f"e^{epsilon:g}" + (f" (about {math.exp(epsilon):,.3g})" if epsilon < 50 else ""),
        "certainty": f"{math.ceil(sure * 1e4) / 1e2:.2f} %" if sure < 0.9999 else "more than 99.99 %",
    }


def _mechanism(event: Mapping[str, Any], count: int = 1) -> tuple[str, str]:
    """(description, noise multiplier) of one event tree, for the table."""
    name, times = event["class_name"], "once" if count == 1 else f"{count:,} times"
    if name == "SelfComposedDpEvent":
        return _mechanism(event["event"], count * event["count"])
    if name == "PoissonSampledDpEvent" and event["event"]["class_name"] == "GaussianDpEvent":
        rate = f"{event['sampling_probability']:.4g}"
        return f"DP-SGD: {count:,} steps, sample rate {rate}", f"{event['event']['noise_multiplier']:.4g}"
    if name == "GaussianDpEvent":
        return f"Gaussian mechanism, {times}", f"{event['noise_multiplier']:.4g}"
    if name == "RandomizedResponseDpEvent":
        kept = f"a label is replaced with probability {event['noise_parameter']:.4g}"
        return f"Randomized response over {event['num_buckets']} classes, {times}; {kept}", "-"
    return f"{name}, {times} (see privacy_report.json)", "-"


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return ""
    where = f"`{audit['dataset']}`, preset `{audit['preset']}`, for a release of epsilon {audit['epsilon']:g}"
    claim, bound = f"{round_up(audit['claim']):.3f}", f"{audit['epsilon_lower_bound']:.3g}"
    return (
        f"\nThe same training code was attacked on public data ({where}).\n"
        f"{audit['num_canaries']:,} canaries; {_cell(audit['method'])}.\n"
        f"The attacked stages claim epsilon = {claim} there. The attack shows that it is at least {bound},\n"
        f"with {audit['confidence']:.0%} confidence: a check of the claim from below.\n"
    )


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
