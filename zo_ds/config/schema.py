"""Every setting, with its meaning beside it. Unknown keys are refused; nothing is read from the environment."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zo_ds.maths.directions import NoiseStructure
from zo_ds.maths.estimators import Baseline, Estimator, EstimatorSpec, SpreadStd
from zo_ds.maths.schedules import Schedule

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
MOST_COEFFICIENTS = 2**16 - 1
"""Of a step: a journal counts them in 16 bits."""


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class ModelConfig(Section):
    """Which model is tuned."""

    path: str
    """Folder in Hugging Face layout, hub name, or `catalog:NAME` for a model that a registry package ships."""
    revision: str | None = None
    """Commit of a hub model."""
    gguf: str | None = None
    """A GGUF file within the folder or hub model: transformers decodes it to plain weights of `dtype`, and takes the
    configuration and tokenizer from it; most architectures need `pip install gguf`. The model of the catalogue that is
    such a file needs neither key nor package: zo_ds decodes it itself, to the same weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """How matrices are held; vectors (norm weights, biases) are always held in float32."""
    head: Literal["auto", "causal_lm", "masked_lm", "sequence_classification"] = "auto"
    """Which transformers class is used; auto follows the architecture named in the model's own config."""


class PeftConfig(Section):
    """What is trained instead of the whole model (docs/adapters.md)."""

    method: Literal["none", "lora", "prefix", "prompt", "ia3", "bias"] = "none"
    """none: all weights; lora, ia3, prefix (tuning), prompt (tuning): an adapter of the `peft` library on the frozen
    model; bias: the biases that the model has."""
    r: PositiveInt = 8
    """lora: rank."""
    alpha: PositiveInt = 16
    """lora: its product is multiplied by alpha / r."""
    target_modules: tuple[str, ...] | Literal["auto"] = "auto"
    """lora, ia3: ends of the names of the layers that get an adapter; auto: what peft chooses for the architecture
    (q_proj and v_proj of OPT and Llama)."""
    virtual_tokens: PositiveInt = 5
    """prefix, prompt: how many."""
    start: Literal["tokens", "noise"] = "tokens"
    """tokens: a prefix begins with keys and values of real tokens, a prompt with their embeddings; or small noise."""
    start_text: str | None = None
    """prefix, prompt: take the tokens from this text; None: from anywhere in the vocabulary."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Of what an adapter starts from."""
    path: str | None = None
    """Folder of a saved adapter (peft's format) to go on from; its own settings count then, not those above."""

    @model_validator(mode="after")
    def _check(self) -> PeftConfig:
        if self.path is not None and self.method in ("none", "bias"):
            raise ValueError(f"path names an adapter, but method is {self.method}; set method to the kind it is")
        return self


class DataConfig(Section):
    """Which labelled text it is tuned on."""

    path: str
    """Folder in the hub's layout (train.jsonl, dev.jsonl, test.jsonl; parquet, parts and validation-* too), one JSONL
    file, hub name, or `catalog:NAME`."""
    subset: str | None = None
    """Configuration of a hub data set (super_glue has boolq, cb, ...), or the folder of that name."""
    revision: str | None = None
    """Commit of a hub data set."""
    splits: Literal["auto", "files", "published"] = "auto"
    """files: train, dev and test are files; published: train and dev are drawn from the training rows, test from the
    validation rows, as many as the task's protocol draws; auto: published for tasks that have such a protocol."""
    shots: PositiveInt | None = None
    """So many examples of each class to train on, and as many to choose the model by."""
    text_field: str = "text"
    """Key of the text in a row."""
    label_field: str = "label"
    """Key of the label in a row: an integer from 0, or the label's name."""
    max_length: PositiveInt | None = None
    """Tokens a prompt may have; longer texts are cut and counted. None: what the model can take."""
    train_examples: PositiveInt | None = None
    """Train on so many examples: the first of a file, or as many as are drawn."""
    dev_examples: PositiveInt | None = None
    """Choose the model by so many."""
    test_examples: PositiveInt | None = None
    """Report on so many."""
    balanced: bool = True
    """Draw as many examples of every class into each batch, where a task has classes (the batch must be divisible by
    them)."""
    group_by_length: bool = True
    """Put texts of like length into one batch, so that little is spent on padding."""
    seed: int = 0
    """Which examples are drawn, and their order: a batch is a pure function of this and the step."""


class TaskConfig(Section):
    """How text becomes a question to the model, what is learned and what is measured."""

    name: str = "classification"
    """A task that zo_ds knows (docs/tasks.md); `classification` takes the two settings below from here."""
    template: str | None = None
    """Prompt with `{text}`; masked LMs also need `{mask}`."""
    label_words: tuple[str, ...] | None = None
    """Answer for label 0, 1, ..., without the space that joins it to the prompt."""
    objective: Literal["auto", "cross_entropy", "answer", "margin", "accuracy", "f1", "reward"] = "auto"
    """What a step lowers: cross-entropy over the options; negative log-likelihood of the right answer's tokens; margin
    of the best wrong option over the right one; share of wrong answers; 1 - F1 of a generated answer; or the negative
    of `reward`. auto: the task's own."""
    reward: str | None = None
    """`module:function` of your own, (prompt, generated text, accepted answers) -> float; more is better."""
    length_normalised: bool = True
    """Score an option by the mean log-likelihood of its tokens, as the published protocol; false: by the sum."""
    calibrated: bool = False
    """Evaluation: subtract an option's score behind the prompt without content (SFC), where the task has one."""
    max_new_tokens: PositiveInt | None = None
    """Tokens of a generated answer; None: the task's."""


class ZerothOrderConfig(Section):
    """The estimator and its constants. The same block stands in a DeepSpeed JSON as `zeroth_order`."""

    estimator: Estimator = Estimator.FZOO
    """How losses become a step; docs/estimators.md has the formulas. fzoo: differences from the clean loss, divided by
    their spread; fzoo_r: the same with the spread of two steps; mezo: two-sided; zo_sgd: one-sided; zo_sgd_sign: signs
    of two-sided differences; zo_sgd_cons: a two-sided step is taken forward, back or not at all, whichever is best."""
    num_directions: PositiveInt = 8
    """N, perturbations per step; fzoo needs 4 or more, fzoo_r 3 or more, zo_sgd_cons exactly 1."""
    baseline: Baseline = Baseline.CLEAN
    """What the losses of fzoo, fzoo_r and zo_sgd are compared with. clean: the loss at theta; mean: the mean of the
    other perturbed losses, which saves the forward at theta."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """beta: a step is the sum of past ones times (1 - beta) beta^age. There is no buffer: their noise is made anew."""
    momentum_window: Annotated[int, Field(ge=2)] = 16
    """Steps that count in it, this one included; used only where momentum is not 0. An update makes this many times the
    noise."""
    eps: PositiveFloat = 1e-3
    """Perturbation radius, in weight units."""
    lr: PositiveFloat | Literal["rule", "auto"] = "rule"
    """fzoo, fzoo_r: weight units per normalised step; zo_sgd_sign: weight units; the others multiply the gradient
    estimate with it. rule: from estimator, N, the number of trained weights and the length of the run; auto: measured
    before the first step, for less than 5 % of the run's forwards (docs/learning_rate.md)."""
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
    """dense: independent signs; factored: rank-1 sign matrices a b^T; gaussian: independent standard normals."""
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
        _ = self.estimator_spec  # refuses what the estimator cannot work with
        if self.num_directions * self.window > MOST_COEFFICIENTS:
            raise ValueError(
                f"num_directions * momentum_window is {self.num_directions * self.window}: the record of a step has "
                f"room for {MOST_COEFFICIENTS} coefficients; use fewer directions or a shorter window"
            )
        if self.estimator is Estimator.ZO_SGD_SIGN and self.noise is NoiseStructure.GAUSSIAN:
            raise ValueError(
                "noise is gaussian: zo_sgd_sign moves every weight by the same length, which needs signs; "
                "use noise: dense, or estimator: mezo"
            )
        if isinstance(self.lr, float) and self.lr * self.weight_decay > 1:
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
            self.estimator,
            self.num_directions,
            self.spread_std,
            self.spread_floor,
            self.coefficient_cap,
            self.baseline,
        )

    @property
    def window(self) -> int:
        """How many steps' directions a step moves along, its own included."""
        return self.momentum_window if self.momentum else 1


class FirstOrderConfig(Section):
    """The optimizer of a run with gradients, the baseline of zeroth-order runs (`method: first_order`)."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw: torch.optim.AdamW; sgd: torch.optim.SGD, with momentum if that is not 0."""
    lr: PositiveFloat = 1e-5
    """Learning rate. The fine-tuning baselines of the MeZO paper were tuned over 1e-5, 5e-5 and 8e-5."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """theta shrinks by lr * weight_decay a step, apart from the gradient, with sgd too; matrices only."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """adamw: decay of the means of gradients and of their squares."""
    eps: PositiveFloat = 1e-8
    """adamw: what is added to the root of the second mean."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """sgd: how much of the last step's direction is kept."""
    lr_schedule: Schedule = Schedule.CONSTANT
    """constant, linear or cosine, after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which lr rises linearly."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where linear and cosine schedules end, as a fraction of their peak."""
    max_grad_norm: PositiveFloat | None = None
    """A longer gradient is cut to this length; None: never."""
    max_consecutive_skips: PositiveInt = 5
    """So many steps in a row with a loss or gradient that is not finite stop the run."""


class InContextConfig(Section):
    """Demonstrations (`method: in_context`)."""

    shots: PositiveInt = 32
    """Answered training examples before each prompt, fewer where they do not fit."""


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
    best_by: Literal["loss", "metric"] = "loss"
    """What makes a model the best on the dev set; the loss is the steadier judge on few examples, the metric
    (accuracy, F1) is what is reported."""
    patience: PositiveInt | None = None
    """Stop when so many evaluations on the dev set in a row found no better model; None: never."""
    eval_batch_size: PositiveInt = 16
    """Examples in one forward pass of an evaluation."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}; "
                "choose a divisor, since every unit of work must have the same shape"
            )
        if self.patience is not None and self.eval_every is None:
            raise ValueError("patience counts evaluations, and there is only one at the end; set eval_every too")
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
    peft: PeftConfig = PeftConfig()
    data: DataConfig
    task: TaskConfig = TaskConfig()
    method: Literal["zeroth_order", "first_order", "zero_shot", "in_context", "linear_probe"] = "zeroth_order"
    """zeroth_order: forwards only; first_order: gradients, as a baseline; zero_shot: no training; in_context: no
    training, solved examples in the prompt; linear_probe: a classifier on the model's frozen representation."""
    zeroth_order: ZerothOrderConfig = ZerothOrderConfig()
    first_order: FirstOrderConfig = FirstOrderConfig()
    in_context: InContextConfig = InContextConfig()
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    journal: JournalConfig = JournalConfig()
    output: OutputConfig = OutputConfig()
    deepspeed: str | dict[str, Any] = Field(default_factory=dict)
    """Path of a DeepSpeed JSON, or the same inline."""
