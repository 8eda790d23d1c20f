"""How a task is asked of a model: what a step lowers, and what an evaluation reports."""

from __future__ import annotations

from dataclasses import dataclass

from zo_ds.config.schema import TaskConfig
from zo_ds.errors import ConfigError
from zo_ds.forward.evaluator import LossFunction
from zo_ds.forward.rowwise import RowWise
from zo_ds.tasks.calibration import Calibrated
from zo_ds.tasks.generation import GenerationJudge, Generator
from zo_ds.tasks.head import Head
from zo_ds.tasks.likelihood import AnswerLikelihood, ChatLikelihood, CompletionLikelihood, Likelihood, TextLikelihood
from zo_ds.tasks.masked import LabelWords
from zo_ds.tasks.objectives import SCORE_LOSSES
from zo_ds.tasks.options import OptionLikelihood
from zo_ds.tasks.prompts import Tokenizer
from zo_ds.tasks.reward import find_reward
from zo_ds.tasks.scorer import Scorer
from zo_ds.tasks.task import Metric, Objective, Task

_LIKELIHOODS: dict[str, type[Likelihood]] = {
    "text": TextLikelihood,
    "completion": CompletionLikelihood,
    "chat": ChatLikelihood,
}


@dataclass(frozen=True)
class Asking:
    """The two ways in which a task is put to a model; they may be the same.

    Attributes:
        learner: its `loss` is what a step lowers.
        judge: its `grade` is what an evaluation reports.
    """

    learner: Scorer
    judge: Scorer

    @property
    def loss_fn(self) -> LossFunction:
        """What the engine evaluates."""
        return RowWise(self.learner.loss) if isinstance(self.learner, Generator) else self.learner.loss

    @property
    def metric(self) -> str:
        """Name of what counts."""
        return self.judge.columns[0]


def make_asking(task: Task, config: TaskConfig, head: str, tokenizer: Tokenizer, max_tokens: int) -> Asking:
    """How a task is asked of a model.

    Args:
        task: see `zo_ds.tasks.registry.resolve_task`.
        config: the recipe's.
        head: causal_lm, masked_lm or sequence_classification.
        tokenizer: of the model.
        max_tokens: of a sequence.

    Raises:
        ConfigError: this kind of model cannot be asked so.
    """
    if head == "causal_lm":
        return _causal(task, config, tokenizer, max_tokens)
    if task.metric is not Metric.ACCURACY or not task.label_words or task.objective not in SCORE_LOSSES:
        raise ConfigError(
            f"the task '{task.name}' with objective {task.objective.value} needs a causal LM",
            where=f"model.head is {head}",
            remedy="use a causal LM, or a task with label words",
        )
    loss = SCORE_LOSSES[task.objective]
    kind = LabelWords if head == "masked_lm" else Head
    scorer = kind(task, tokenizer, max_tokens, loss)
    return Asking(scorer, _judge(scorer, config, task))


def _causal(task: Task, config: TaskConfig, tokenizer: Tokenizer, max_tokens: int) -> Asking:
    if task.masked:
        raise ConfigError(
            f"the task '{task.name}' is asked through a mask, and a causal LM has none",
            where="task.name",
            remedy="use the task without -masked, or a masked LM (RoBERTa, BERT)",
        )
    reward = find_reward(config.reward) if config.reward else None
    likelihood = _LIKELIHOODS.get(task.name, AnswerLikelihood)
    learner: Scorer
    if task.objective in (Objective.F1, Objective.REWARD):
        learner = Generator(task, tokenizer, max_tokens, reward)
    elif task.objective is Objective.ANSWER:
        learner = likelihood(task, tokenizer, max_tokens)
    else:
        loss = SCORE_LOSSES[task.objective]
        learner = OptionLikelihood(task, tokenizer, max_tokens, loss, normalised=config.length_normalised)
    judge: Scorer
    if task.metric in (Metric.F1, Metric.REWARD):
        judge = GenerationJudge(task, tokenizer, max_tokens, reward if task.metric is Metric.REWARD else None)
    elif task.metric is Metric.LOSS:
        judge = learner if isinstance(learner, Likelihood) else likelihood(task, tokenizer, max_tokens)
    elif isinstance(learner, OptionLikelihood) and not config.calibrated:
        judge = learner
    else:
        # Calibrated scores are sums in the published protocol.
        normalised = config.length_normalised and not config.calibrated
        judge = OptionLikelihood(task, tokenizer, max_tokens, normalised=normalised)
    return Asking(learner, _judge(judge, config, task))


def _judge(judge: Scorer, config: TaskConfig, task: Task) -> Scorer:
    if not config.calibrated:
        return judge
    if task.metric is not Metric.ACCURACY:
        raise ConfigError(
            f"the answers of the task '{task.name}' cannot be calibrated",
            where="task.calibrated",
            why="calibration compares the scores of options",
            remedy="leave task.calibrated away",
        )
    return Calibrated(judge)
