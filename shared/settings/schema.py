"""The settings as a typed, frozen tree. Every key has a default, so a file names only
what it changes.

Knows the keys and what they may hold, nothing of files (`load.py` reads those). Names of keys
are public: users' files have them. docs/settings.md is made from the descriptions in this file.
"""

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from specl.shared.settings.plugins import is_plugin

SECRETS = {("gateway",), ("gateway", "token")}  # an error message never repeats their values
LOSSES = ("ce", "kl", "tv", "mixed", "acceptance")
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TargetModel(_Section):
    """The model whose text is served."""

    name: str = Field("smollm2-135m", description="a name that docs/models.md explains")


class DraftModel(_Section):
    """The model that drafts tokens for the target to verify."""

    name: str | None = Field(
        "smollm2-135m-head", description="a name that docs/models.md explains, or null for no draft"
    )


class Models(_Section):
    """Which models are loaded, and in which precision."""

    target: TargetModel = TargetModel()
    draft: DraftModel = DraftModel()
    precision: Literal["auto", "native", "fp32"] = Field(
        "auto", description="auto: dense fp32 on CPU, the model's own quantisation on Metal and CUDA"
    )


class Speculative(_Section):
    """Speculative decoding, and the defaults of a request."""

    num_draft_tokens: Literal["auto"] | Annotated[int, Field(ge=0, le=16)] = Field(
        "auto", description="auto: chosen every round from measured costs; a number: exactly that many"
    )
    max_draft_tokens: Annotated[int, Field(ge=1, le=16)] = Field(
        7, description="the longest draft that `auto` may choose"
    )
    ngram: bool = Field(
        True,
        description="also draft from repeats of the running text and, in the daemon, of the same client's past answers",
    )
    drafter: str | None = Field(None, description="`module:name` of a custom drafter (docs/api.md)")
    temperature: Annotated[float, Field(ge=0, le=10)] = Field(
        0.7, description="default when a request does not set it; 0: greedy"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="default when a request does not set it; 1: off"
    )
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="default when a request does not set it; 0: off")
    min_p: Share = Field(0.0, description="default when a request does not set it; 0: off")
    max_tokens: Annotated[int, Field(ge=1)] = Field(512, description="default when a request does not set it")
    mode: Literal["detailed", "fast"] = Field(
        "detailed",
        description="fast: text and tokens are recorded, but no log-probabilities, disagreements or hidden states, so nothing is learned",
    )
    acceptance_threshold: Share = Field(
        0.5, description="a generation with a lower acceptance rate is a failure, which the draft learns from"
    )

    @field_validator("drafter")
    @classmethod
    def _form(cls, name: str | None) -> str | None:
        if name is not None and not is_plugin(name):
            raise ValueError("must be `module:name`")
        return name


class Lora(_Section):
    """The shape of an adapter."""

    rank: Annotated[int, Field(ge=1, le=512)] = Field(32, description="rank of the low-rank matrices")
    alpha: Annotated[float, Field(gt=0)] = Field(64.0, description="the update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of the adapter's input while training")
    target_modules: list[str] | Literal["all"] = Field(
        "all", description="names of linear layers, e.g. [q_proj, v_proj]"
    )


class Loss(_Section):
    """The loss that a training step minimises."""

    type: str = Field(
        "acceptance", description="ce, kl, tv, mixed, acceptance, or `module:name` of a custom loss (docs/api.md)"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="of the distributions that are compared")
    alpha: Share = Field(0.5, description="mixed: weight of KL against cross-entropy")
    top_k_logits: Annotated[int, Field(ge=1, le=256)] = Field(
        32, description="log-probabilities of the target that are stored at each position"
    )
    error_weight: Annotated[float, Field(ge=1)] = Field(
        2.0, description="weight of a position where the draft disagreed with the target"
    )

    @field_validator("type")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in LOSSES and not is_plugin(name):
            raise ValueError(f"must be {', '.join(LOSSES)} or `module:name`")
        return name


class Training(_Section):
    """When and how the draft learns."""

    enabled: bool = Field(
        True,
        description="false: train only when asked (`specl-ctl train`, the page, `purge --retrain`)",
    )
    lora: Lora = Lora()
    loss: Loss = Loss()
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(3e-4, description="of AdamW; it falls along a cosine")
    batch_size: Annotated[int, Field(ge=1, le=64)] = Field(6, description="texts of one batch")
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=64)] = Field(1, description="batches of one step")
    num_epochs: Annotated[int, Field(ge=1)] = Field(30, description="passes over the failures at most")
    max_minutes: Annotated[float, Field(gt=0)] = Field(
        5.0, description="wall-clock time that one run may take for its steps"
    )
    min_failure_cases: Annotated[int, Field(ge=1)] = Field(50, description="new failures that start a run")
    max_failure_cases: Annotated[int, Field(ge=1)] = Field(1000, description="failures of one run at most")
    replay_ratio: Share = Field(0.67, description="share of a batch that is replay: successes and general text")
    replay_buffer_size: Annotated[int, Field(ge=0)] = Field(
        500, description="the most stored answers that are replayed, and the most texts that came with the draft"
    )
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of conversations that are never trained on"
    )
    min_heldout_generations: Annotated[int, Field(ge=2)] = Field(
        30, description="held-out generations that a verdict needs; with fewer there is none, and collecting goes on"
    )
    regression_prompts: Annotated[int, Field(ge=0, le=200)] = Field(
        200, description="shipped general prompts on which an adapter must not get worse; 0: no such test"
    )
    idle_seconds: Annotated[float, Field(ge=0)] = Field(
        2.0, description="time without a request before a training step is taken"
    )
    on_battery: bool = Field(False, description="false: the trainer waits while the machine runs on its battery")
    when_hot: bool = Field(
        False, description="false: the trainer waits while macOS warns of heat or slows the processor because of it"
    )
    threads: Annotated[int, Field(ge=1)] = Field(1, description="BLAS threads of the trainer")


class Memory(_Section):
    """How much memory is used."""

    gradient_checkpointing: bool = Field(False, description="true: training takes less memory and more time")
    cache_clear_frequency: Annotated[int, Field(ge=0)] = Field(
        50, description="generations between two clearings of the buffer cache of MLX; 0: never"
    )
    max_kv_cache_tokens: Annotated[int, Field(ge=64)] = Field(
        8192, description="of all requests together; an answer that reaches it ends there"
    )
    idle_unload_minutes: Annotated[float, Field(ge=0)] = Field(
        0, description="the models are unloaded after so long without a request, until the next one; 0: never"
    )
    limit_gb: Literal["auto", "none"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="models whose estimate is higher are not loaded; auto: nine tenths of the machine's memory; none: no limit",
    )


class Serving(_Section):
    """Limits of requests."""

    queue_limit: Annotated[int, Field(ge=1)] = Field(
        256, description="requests that may wait; more are refused as busy"
    )
    client_queue_limit: Annotated[int, Field(ge=1)] = Field(
        128, description="requests of one client that may wait or run at once"
    )
    max_prompt_kb: Annotated[int, Field(ge=1, le=4096)] = Field(1024, description="text of one request at most")
    max_active: Annotated[int, Field(ge=1, le=32)] = Field(4, description="requests that are decoded together")
    client_timeout_s: Annotated[float, Field(gt=0)] = Field(
        10.0,
        description="without a heartbeat for so long a client is looked for; it is cancelled if its connection is gone",
    )
    threads: Annotated[int, Field(ge=0)] = Field(0, description="BLAS threads of inference; 0: all cores")


class Records(_Section):
    """What is kept of a generation, and for how long."""

    keep: Literal["content", "statistics"] = Field(
        "content", description="statistics: no text, token or log-probability is stored, so the draft cannot learn"
    )
    redact: list[str] = Field(
        [],
        description="regular expressions; text that they match is not stored, nor are the tokens of that generation. "
        "Where they take longer than 2 s, only statistics are stored",
    )
    retention_days: Annotated[float, Field(ge=0)] = Field(0, description="older generations are removed; 0: none are")
    max_generations: Annotated[int, Field(ge=0)] = Field(0, description="the oldest are removed first; 0: any number")
    max_store_mb: Annotated[int, Field(ge=0)] = Field(4096, description="the oldest are removed first; 0: any size")
    outbox_limit_mb: Annotated[int, Field(ge=1)] = Field(1024, description="undelivered records; more are refused")
    hidden_spool_mb: Annotated[int, Field(ge=0)] = Field(
        512, description="hidden states that a `head` draft is trained with; 0: none are stored"
    )

    @field_validator("redact")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        if not patterns:
            return patterns
        import regex  # only here: most settings have no pattern, and every command would wait for it

        for pattern in patterns:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns


class Bus(_Section):
    """How processes reach each other (ZeroMQ)."""

    transport: Literal["ipc", "tcp"] = Field("ipc", description="ipc: sockets in the run directory; tcp: ports")
    host: str = Field(
        "127.0.0.1", description="tcp: on loopback keys are made at first start; beyond it, `specl-ctl keys make`"
    )
    port: Annotated[int, Field(ge=1, le=65530)] = Field(5570, description="tcp: the first of six ports in a row")


class Gateway(_Section):
    """The HTTP server: an OpenAI-compatible API and a page."""

    enabled: bool = Field(True, description="false: no HTTP server")
    host: str = Field("127.0.0.1", description="beyond loopback only with allow_remote and a token")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8080, description="0: any free port; `status` names it")
    allow_remote: bool = Field(False, description="true: other machines may connect (plain HTTP: put TLS in front)")
    token: Annotated[str, Field(min_length=16)] | None = Field(
        None, repr=False, description="bearer token that every request must show; `SPECL_GATEWAY_TOKEN` wins over it"
    )
    hosts: list[str] = Field([], description="further host names that requests may use; others are refused")
    origins: list[str] = Field(
        [],
        description="other sites and apps whose pages may send requests (CORS), as browsers name them: `app://obsidian.md`",
    )
    max_body_kb: Annotated[int, Field(ge=1, le=16384)] = Field(2048, description="body of one request at most")
    requests_per_minute: Annotated[int, Field(ge=0)] = Field(600, description="from one address; 0: any number")
    max_streams: Annotated[int, Field(ge=1, le=1024)] = Field(
        256, description="answers that are generated or wait at once; more are refused as busy"
    )
    request_timeout_s: Annotated[float, Field(gt=0)] = Field(
        20.0, description="time for the headers of a request, and then for its body"
    )
    send_timeout_s: Annotated[float, Field(gt=0)] = Field(
        60.0, description="a client that reads nothing of its answer for so long is cut off"
    )
    trusted_proxies: list[str] = Field(
        [],
        description="addresses or networks of proxies whose X-Forwarded-For names the client, for the limits of one address",
    )
    max_event_streams: Annotated[int, Field(ge=1)] = Field(32, description="open pages (live views) at most")
    max_event_streams_per_address: Annotated[int, Field(ge=1)] = Field(
        8, description="open pages of one address at most"
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _addresses(cls, proxies: list[str]) -> list[str]:
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"{proxy!r} is no address and no network: {error}") from error
        return proxies

    @field_validator("origins")
    @classmethod
    def _exact(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/*\s]+", origin):
                raise ValueError(
                    f"{origin!r} is no origin: scheme://name or scheme://name:port, without a path; `*` and `null` would let everybody in"
                )
        return origins


class Logging(_Section):
    """The logs of the daemons."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="the lowest level that is written")


class Settings(_Section):
    """All settings."""

    models: Models = Models()
    speculative: Speculative = Speculative()
    training: Training = Training()
    memory: Memory = Memory()
    serving: Serving = Serving()
    records: Records = Records()
    bus: Bus = Bus()
    gateway: Gateway = Gateway()
    logging: Logging = Logging()
