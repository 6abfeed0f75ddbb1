"""The typed settings tree. Every key has a default, so a file names only what it changes.

The sources' names are kept (DESIGN: names and keys). Reading a file is in `load.py`.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from specl.shared.settings.plugins import is_hook

SECRETS = {("gateway",), ("gateway", "token")}  # what was given there is never repeated in an error
LOSSES = ("ce", "kl", "tv", "mixed", "acceptance")
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TargetModel(_Section):
    """The model whose words are served."""

    name: str = Field("smollm2-135m", description="any name of docs/models.md")


class DraftModel(_Section):
    """The model that guesses."""

    name: str | None = Field("smollm2-135m-head", description="any name of docs/models.md, or null for none")


class Models(_Section):
    """Which models, and how they are held."""

    target: TargetModel = TargetModel()
    draft: DraftModel = DraftModel()
    precision: Literal["auto", "native", "fp32"] = Field(
        "auto", description="auto: dense fp32 on CPU, the model's own quantisation on Metal and CUDA"
    )


class Speculative(_Section):
    """Decoding."""

    num_draft_tokens: Literal["auto"] | Annotated[int, Field(ge=0, le=16)] = Field(
        "auto", description="auto: chosen every round from measured costs; a number: exactly that many"
    )
    max_draft_tokens: Annotated[int, Field(ge=1, le=16)] = Field(7, description="the most that `auto` may choose")
    ngram: bool = Field(
        True,
        description="also draft from repeats of the running text and, in the daemon, of the same client's past answers",
    )
    drafter: str | None = Field(None, description="`module:name` of a drafter of your own (docs/api.md)")
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="0: off")
    min_p: Share = Field(0.0, description="0: off")
    max_tokens: Annotated[int, Field(ge=1)] = 512
    mode: Literal["detailed", "fast"] = Field(
        "detailed",
        description="fast: the text is kept, but no law, disagreement or hidden state, so nothing is learned from it",
    )
    acceptance_threshold: Share = Field(0.5, description="a generation below it is a failure")

    @field_validator("drafter")
    @classmethod
    def _form(cls, name: str | None) -> str | None:
        if name is not None and not is_hook(name):
            raise ValueError("must be `module:name`")
        return name


class Lora(_Section):
    """The adapter's shape."""

    rank: Annotated[int, Field(ge=1, le=512)] = 32
    alpha: Annotated[float, Field(gt=0)] = 64.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | Literal["all"] = Field(
        "all", description="names of linear layers, e.g. [q_proj, v_proj]"
    )


class Loss(_Section):
    """What a step minimises."""

    type: str = Field(
        "acceptance", description="ce, kl, tv, mixed, acceptance, or `module:name` of your own (docs/api.md)"
    )
    temperature: Annotated[float, Field(gt=0)] = 1.0
    alpha: Share = Field(0.5, description="mixed: weight of KL against cross-entropy")
    top_k_logits: Annotated[int, Field(ge=1, le=256)] = Field(
        32, description="target log-probabilities kept a position"
    )
    error_weight: Annotated[float, Field(ge=1)] = Field(2.0, description="weight of a position the draft got wrong")

    @field_validator("type")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in LOSSES and not is_hook(name):
            raise ValueError(f"must be {', '.join(LOSSES)} or `module:name`")
        return name


class Training(_Section):
    """When and how the draft learns."""

    enabled: bool = Field(
        True,
        description="false: train only when asked (`specl-ctl train`, the page, `purge --retrain`); no second looks",
    )
    lora: Lora = Lora()
    loss: Loss = Loss()
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    batch_size: Annotated[int, Field(ge=1, le=64)] = 6
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=64)] = 1
    num_epochs: Annotated[int, Field(ge=1)] = 30
    max_minutes: Annotated[float, Field(gt=0)] = Field(5.0, description="wall clock of one run's steps")
    min_failure_cases: Annotated[int, Field(ge=1)] = 50
    max_failure_cases: Annotated[int, Field(ge=1)] = 1000
    replay_ratio: Share = Field(0.67, description="share of a batch that replays successes and general text")
    replay_buffer_size: Annotated[int, Field(ge=0)] = Field(
        500, description="stored answers at most that are replayed, and texts that came with the draft"
    )
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of conversations never trained on"
    )
    min_heldout_generations: Annotated[int, Field(ge=2)] = Field(
        30, description="held-out generations that a verdict needs; fewer: no verdict, collecting goes on"
    )
    regression_prompts: Annotated[int, Field(ge=0, le=200)] = Field(
        200, description="shipped general prompts on which no adapter may get worse; 0: none"
    )
    idle_seconds: Annotated[float, Field(ge=0)] = Field(2.0, description="quiet time before a step is taken")
    on_battery: bool = Field(False, description="false: no work of the trainer's while the machine runs on its battery")
    when_hot: bool = Field(False, description="false: nor while macOS warns of heat or slows the processor for it")
    threads: Annotated[int, Field(ge=1)] = Field(1, description="BLAS threads of the trainer")


class Memory(_Section):
    """What is held, and how much."""

    gradient_checkpointing: bool = False
    cache_clear_frequency: Annotated[int, Field(ge=0)] = Field(50, description="generations; 0: never")
    max_kv_cache_tokens: Annotated[int, Field(ge=64)] = Field(
        8192, description="all requests together; an answer that reaches it ends there"
    )
    idle_unload_minutes: Annotated[float, Field(ge=0)] = Field(
        0, description="after so long without a request the models are let go until the next one; 0: never"
    )
    limit_gb: Literal["auto", "none"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="models that need more by estimate are not loaded; auto: nine tenths of the machine; none: no limit",
    )


class Serving(_Section):
    """The queue."""

    queue_limit: Annotated[int, Field(ge=1)] = 32
    client_queue_limit: Annotated[int, Field(ge=1)] = Field(16, description="requests of one client at once")
    max_prompt_kb: Annotated[int, Field(ge=1, le=4096)] = Field(1024, description="text of one request")
    max_active: Annotated[int, Field(ge=1, le=32)] = Field(4, description="requests served round by round at once")
    client_timeout_s: Annotated[float, Field(gt=0)] = Field(10.0, description="a silent client's request is cancelled")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="BLAS threads of inference; 0: all cores")


class Records(_Section):
    """What is kept of a generation, and for how long."""

    keep: Literal["content", "statistics"] = Field(
        "content", description="statistics: no text, token or law is kept, so the draft cannot learn"
    )
    redact: list[str] = Field(
        [], description="regular expressions; what they match is not kept, nor are the tokens of such a generation"
    )
    retention_days: Annotated[float, Field(ge=0)] = Field(0, description="0: for ever")
    max_generations: Annotated[int, Field(ge=0)] = Field(0, description="the oldest go first; 0: any number")
    max_store_mb: Annotated[int, Field(ge=0)] = Field(4096, description="the oldest go first; 0: any size")

    outbox_limit_mb: Annotated[int, Field(ge=1)] = 1024
    hidden_spool_mb: Annotated[int, Field(ge=0)] = Field(512, description="hidden states for a `head` draft; 0: none")

    @field_validator("redact")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns


class Bus(_Section):
    """How processes reach each other."""

    transport: Literal["ipc", "tcp"] = "ipc"
    host: str = Field("127.0.0.1", description="tcp: beyond loopback only with keys (`specl-ctl keys make`)")
    port: Annotated[int, Field(ge=1, le=65530)] = Field(5570, description="tcp: the first of six in a row")


class Gateway(_Section):
    """HTTP: an OpenAI-compatible API and a page."""

    enabled: bool = True
    host: str = Field("127.0.0.1", description="beyond loopback only with allow_remote and a token")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8080, description="0: any free one; `status` says which")
    allow_remote: bool = Field(False, description="true: other machines may connect (plain HTTP: put TLS in front)")
    token: Annotated[str, Field(min_length=16)] | None = Field(
        None, repr=False, description="bearer token that every request must show; `SPECL_GATEWAY_TOKEN` wins over it"
    )
    hosts: list[str] = Field([], description="further names this server may be called by; others are refused")
    origins: list[str] = Field(
        [],
        description="other sites and apps whose pages may ask here (CORS), as browsers name them: `app://obsidian.md`",
    )
    max_body_kb: Annotated[int, Field(ge=1, le=16384)] = Field(2048, description="one request's body")
    requests_per_minute: Annotated[int, Field(ge=0)] = Field(600, description="of one address; 0: any number")
    max_streams: Annotated[int, Field(ge=1, le=256)] = Field(16, description="answers being made at once")
    request_timeout_s: Annotated[float, Field(gt=0)] = Field(
        20.0, description="a request's headers, and then its body, must have come within so long"
    )
    max_event_streams: Annotated[int, Field(ge=1)] = Field(32, description="open pages (live views) in all")
    max_event_streams_per_address: Annotated[int, Field(ge=1)] = Field(8, description="open pages of one address")

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
    """Logs."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(_Section):
    """The whole tree."""

    models: Models = Models()
    speculative: Speculative = Speculative()
    training: Training = Training()
    memory: Memory = Memory()
    serving: Serving = Serving()
    records: Records = Records()
    bus: Bus = Bus()
    gateway: Gateway = Gateway()
    logging: Logging = Logging()
