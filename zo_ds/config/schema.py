"""Every setting, with its meaning beside it. Unknown keys are refused; nothing is read from the environment."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zo_ds.maths.directions import NoiseStructure
from zo_ds.maths.estimators import Estimator, EstimatorSpec, SpreadStd
from zo_ds.maths.schedules import Schedule

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class ModelConfig(Section):
    """Which model is tuned."""

    path: str
    """Folder in Hugging Face layout, hub name, or `catalog:NAME` for a model that a registry package ships."""
    revision: str | None = None
    """Commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """How matrices are held; vectors (norm weights, biases) are always held in float32."""
    head: Literal["auto", "causal_lm", "masked_lm", "sequence_classification"] = "auto"
    """Which transformers class is used; auto follows the architecture named in the model's own config."""


class DataConfig(Section):
    """Which labelled text it is tuned on."""

    path: str
    """Folder with train.jsonl, dev.jsonl and test.jsonl, or `catalog:NAME`."""
    text_field: str = "text"
    """Key of the text in a row."""
    label_field: str = "label"
    """Key of the label in a row: an integer from 0, or the label's name."""
    max_length: PositiveInt | None = None
    """Tokens a prompt may have; longer texts are cut and counted. None: what the model can take."""
    train_examples: PositiveInt | None = None
    """Use only the first so many rows of train.jsonl."""
    dev_examples: PositiveInt | None = None
    """Use only the first so many rows of dev.jsonl."""
    test_examples: PositiveInt | None = None
    """Use only the first so many rows of test.jsonl."""
    balanced: bool = True
    """Draw as many examples of every class into each batch (the batch must be divisible by the classes)."""
    group_by_length: bool = True
    """Put texts of like length into one batch, so that little is spent on padding."""
    seed: int = 0
    """Order of the examples: a batch is a pure function of this and the step."""


class TaskConfig(Section):
    """How text becomes a question to the model."""

    name: str = "classification"
    """A task that zo_ds knows; `classification` takes the two settings below from here."""
    template: str | None = None
    """Prompt with `{text}`; masked LMs also need `{mask}`."""
    label_words: tuple[str, ...] | None = None
    """Answer for label 0, 1, ..., without the space that joins it to the prompt."""


class ZerothOrderConfig(Section):
    """The estimator and its constants. The same block stands in a DeepSpeed JSON as `zeroth_order`."""

    estimator: Estimator = Estimator.FZOO
    """fzoo, mezo or zo_sgd."""
    num_directions: PositiveInt = 8
    """N, perturbations per step; fzoo needs 4 or more."""
    eps: PositiveFloat = 1e-3
    """Perturbation radius, in weight units."""
    lr: PositiveFloat = 1e-4
    """fzoo: weight units per normalised step; mezo and zo_sgd: multiplies the gradient estimate."""
    lr_schedule: Schedule = Schedule.CONSTANT
    """constant, linear or cosine, after warm-up."""
    eps_schedule: Schedule = Schedule.CONSTANT
    """constant, linear or cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which lr rises linearly."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where linear and cosine schedules end, as a fraction of their peak."""
    total_steps: PositiveInt | None = None
    """Length of the run, needed by schedules that decay; a recipe's `training.steps` is used if None."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """theta shrinks by lr * weight_decay a step; matrices only."""
    noise: NoiseStructure = NoiseStructure.DENSE
    """dense: independent signs; factored: rank-1 sign matrices a b^T."""
    forward: Literal["batched", "sequential"] = "batched"
    """batched: all directions in one forward; sequential: one forward each, the model's own code."""
    replicas_per_pass: PositiveInt | Literal["auto"] = "auto"
    """Directions computed together; auto: as many as activation_budget_mib holds. Changes losses by rounding only."""
    activation_budget_mib: PositiveInt = 1024
    """Memory for the activations of the directions computed together, where replicas_per_pass is auto."""
    strict: bool = False
    """Always compute the same number of directions together, so that neither budget nor ranks change a bit."""
    spread_std: SpreadStd = SpreadStd.SAMPLE
    """sample: divide by N - 1, as the FZOO paper; population: by N, as its released code."""
    spread_floor: PositiveFloat = 1e-8
    """Least spread a step is divided by, in loss units."""
    coefficient_cap: PositiveFloat = 1.0
    """A step with a larger coefficient is skipped, in weight units."""
    max_consecutive_skips: PositiveInt = 5
    """So many skipped steps in a row stop the run with a diagnosis."""
    run_seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of all noise."""

    @model_validator(mode="after")
    def _check(self) -> ZerothOrderConfig:
        if self.estimator is Estimator.FZOO and self.num_directions < 4:
            raise ValueError(
                f"num_directions is {self.num_directions}: fzoo divides by the spread of N losses, and with N < 4 the "
                "expected step is infinite; use 4 or more (8 is the default), or estimator: mezo"
            )
        if self.lr * self.weight_decay > 1:
            raise ValueError(
                f"lr * weight_decay is {self.lr * self.weight_decay:g}: every step would turn the weights over"
            )
        if self.eps_schedule is not Schedule.CONSTANT and self.final_ratio == 0:
            raise ValueError("final_ratio is 0: eps would end at 0; set final_ratio above 0 or eps_schedule: constant")
        return self

    @property
    def estimator_spec(self) -> EstimatorSpec:
        """What the maths layer needs of this."""
        return EstimatorSpec(
            self.estimator, self.num_directions, self.spread_std, self.spread_floor, self.coefficient_cap
        )


class TrainingConfig(Section):
    """Length and size of the run."""

    steps: PositiveInt
    """Updates to make."""
    batch_size: PositiveInt = 16
    """Examples a step, over all ranks."""
    micro_batch_size: PositiveInt = 8
    """Examples in one forward pass: the unit of work that ranks share out, of the same shape on any of them."""
    eval_every: PositiveInt | None = None
    """Score the dev set every so many steps and keep the best model; None: only at the end."""
    best_by: Literal["loss", "accuracy"] = "loss"
    """What makes a model the best on the dev set; the loss is the steadier judge on few examples."""
    eval_batch_size: PositiveInt = 16
    """Examples in one forward pass of an evaluation."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}; "
                "choose a divisor, since every unit of work must have the same shape"
            )
        return self


class ParallelConfig(Section):
    """Ranks: who holds the weights, who computes what, and how they talk."""

    layout: Literal["auto", "solo", "shard_group", "shared_host"] = "auto"
    """solo: a copy of the weights for each rank; shard_group: one in ZeRO-3 shards for each group of ranks;
    shared_host: one in host memory (or on disk) for each node; auto: solo, unless a node cannot hold as many copies."""
    shard_size: PositiveInt | Literal["auto"] = "auto"
    """Ranks of a shard group; auto: those of a node."""
    population: PositiveInt | Literal["auto"] = "auto"
    """Ranks that share out the directions of a step; auto: where there are more ranks than micro-batches."""
    data: PositiveInt | Literal["auto"] = "auto"
    """Ranks that share out the micro-batches of a step; population x data is the number of ranks."""
    gpu_budget_gib: PositiveFloat | Literal["auto"] = "auto"
    """GPU memory that a rank may take, where weights are offloaded; what activations and buffers leave of it keeps
    weights. auto: what is free."""
    channel: Literal["auto", "tcp", "gloo", "mpi"] = "auto"
    """What scalars cross between ranks on; auto: MPI if mpirun started them and mpi4py is installed, else TCP."""
    threads: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of each rank; auto: the cores of the node divided by its ranks."""
    timeout_s: PositiveFloat = 600.0
    """How long setting up may take, and how long a rank waits for the others before it takes them for dead."""
    hang_s: PositiveFloat = 60.0
    """A rank that makes no progress for so long, and for 10 times as long as a step takes, has hung: the job ends."""


class JournalConfig(Section):
    """What makes a run last: journal, snapshots, checks of the weights."""

    sync_every: PositiveInt = 1
    """Records for each fsync; more is faster on slow disks, and a power cut (not a crash) then costs the last few."""
    hash_every: PositiveInt = 10
    """Hash the weights every so many steps, compare the ranks, and journal it."""
    snapshot_replay_s: PositiveFloat = 120.0
    """Write a snapshot when replaying the steps since the last one would take longer than this."""
    keep_snapshots: Annotated[int, Field(ge=2)] = 2
    """Snapshots that stay; older ones are removed."""
    audit_every: PositiveInt = 50
    """Every so many steps, compute one block of the weights anew from the last snapshot and compare."""


class OutputConfig(Section):
    """Where results go."""

    run_dir: str | None = None
    """Folder of this run; None: runs/NAME-DATE-TIME."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    save_model: bool = True
    """Keep the best model, in Hugging Face layout, in RUN/model."""


class ZOConfig(Section):
    """A recipe: everything a run depends on."""

    name: str = "run"
    """Prefix of the run directory."""
    resume: Literal["auto", "never", "fork"] = "auto"
    """auto: go on with an unfinished run of the same recipe; never: refuse to; fork: go on with changed mathematics."""
    model: ModelConfig
    data: DataConfig
    task: TaskConfig = TaskConfig()
    zeroth_order: ZerothOrderConfig = ZerothOrderConfig()
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    journal: JournalConfig = JournalConfig()
    output: OutputConfig = OutputConfig()
    deepspeed: str | dict[str, Any] = Field(default_factory=dict)
    """Path of a DeepSpeed JSON, or the same inline."""
