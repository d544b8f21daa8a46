"""What each metric of a run means: the group that its figure is shown in, and a word on
how to read it. Figures are shown in the order of this table."""

import re
from typing import NamedTuple


class Note(NamedTuple):
    """A row of NOTES: which metrics, where their figure is shown, how to read it."""

    group: str
    pattern: str
    sentence: str


_GROUPS = {
    "Over-optimization": {
        r"reward over KL": "Reward against distance from the reference, in the order "
        "of the steps (Gao et al. 2022). Where the reward of training goes on rising "
        "while the held-out one falls, the policy exploits the reward: keep an earlier "
        "step, or hold the KL.",
    },
    "Loss": {
        r"(eval_)?loss": "What the optimizer minimizes. It should fall for SFT, reward "
        "models and DPO; for PPO and GRPO its level says little.",
        r"nll(_loss)?": "Negative log-likelihood of a trained token, nats: the loss "
        "without its extra terms. Lower is better.",
        r"loss/policy_avg|policy_loss": "The policy's loss alone. It is near 0 by "
        "construction, and its level says little.",
        r"loss/value_avg|critic/loss": "Clipped squared error of the critic's values. "
        "A fall means that it foresees the returns better.",
        r"(eval_)?loss/.*": "One term of the loss, its weight included.",
        r"(eval_)?perplexity": "exp(loss): among how many equally likely tokens the "
        "model hesitates. Lower is better.",
    },
    "Rewards and objective": {
        r"(eval_)?reward": "Mean reward of sampled completions, as the reward gave it. "
        "It should rise, and the held-out line with it.",
        r"(eval_)?gold_reward": "Mean reward by a judge that is not trained on. Where "
        "it falls while the reward rises, the reward is being exploited.",
        r"reward_std": "How far the rewards of a rollout differ (GRPO: those of the "
        "same prompt). Near 0 there is nothing to learn from.",
        r"frac_reward_zero_std": "Share of the prompts whose completions all got the "
        "same score, which teach nothing.",
        r"(eval_)?rewards": "Implicit rewards of the chosen and the rejected side, "
        "beta * log(policy / reference). The gap between them should open.",
        r"(eval_)?rewards/.*/std": "How far one of the rewards differs between "
        "completions, before its weight.",
        r"(eval_)?rewards/(?!accurac|margin).*": "Mean of one of the rewards, before "
        "its weight.",
        r"(mean|min|max)_reward": "Scores that the reward model gives: mean, smallest "
        "or largest. Only differences count, so that a drift of all of them does no "
        "harm.",
        r"objective/scores": "Mean reward after clipping and penalty: what is learned "
        "from.",
        r"objective/non_score_reward": "What the KL takes from the reward, "
        "kl_coef * KL, as a negative number.",
        r"objective/rlhf_reward": "Score less the KL's part: what PPO maximizes.",
        r"objective/kl_coef": "Reward lost per nat of KL. It moves only where a KL "
        "target is set.",
        r"objective/kl|eval_kl": "How far the policy has gone from the reference, nats "
        "a completion. A rise that the held-out reward does not follow is "
        "over-optimization.",
        r"objective/kl_update": "The same while a rollout is learned from, by its own "
        "completions reweighted. It shows how far the updates go.",
        r"objective/entropy": "Sum of -log p over a completion, nats. Near 0 the "
        "policy always says the same.",
    },
    "Accuracy": {
        r"(eval_)?(rewards/)?accurac(y|ies)": "Share of the pairs whose chosen side "
        "gets the higher reward. 0.5 is chance.",
        r"(eval_)?(rewards/)?margins?": "Reward of the chosen less that of the "
        "rejected side, mean over pairs. It should rise above 0.",
        r"mean_token_accuracy": "Share of the trained tokens that the model holds for "
        "the most likely. Higher is better.",
        r"entropy|policy/entropy_avg": "Entropy of the next token's distribution, nats "
        "a token. Near 0 the model no longer varies.",
    },
    "Policy and value": {
        r"kl": "KL to the reference (k3), nats a token: how far the policy has gone.",
        r"(eval_)?logps": "Log-probability of the chosen and the rejected side, nats a "
        "completion. DPO often lowers both; what counts is the gap.",
        r"lengths": "Trained tokens of the chosen and the rejected side, mean over the "
        "pairs of a step. Where one side is longer, the loss may be won by length.",
        r"policy/approxkl_avg|approx_kl": "How far the updates moved the policy from "
        "the one that sampled, nats a token. Jumps mean too large updates.",
        r"policy/clipfrac_avg|clip_ratio/.*": "Share of the tokens that clipping keeps "
        "from being learned from. Much of it means too large updates.",
        r"val/clipfrac_avg": "Share of the critic's values that clipping holds back. "
        "Much of it means that the critic wants to move fast.",
        r"(val/)?ratio": "Probability of a sampled token now, over that at rollout "
        "time. It should stay near 1.",
        r"(val/)?ratio_first": "The ratio at the first update of a rollout: 1 up to "
        "rounding, since sampling and training share one model.",
        r"val/ratio_var": "Variance of the ratio between the updates of a rollout. "
        "Small is steady.",
        r"val/num_eos_tokens": "Completions of a rollout that ended by themselves.",
        r"completions/clipped_ratio": "Share of the completions that were cut off at "
        "the length limit.",
        r"(eval_)?stopped": "Share of the completions that ended by themselves.",
        r"completions/.*terminated_length": "Tokens of those completions that ended by "
        "themselves.",
        r"completions/.*length|eval_completion_length": "Tokens of the completions. A "
        "steady rise can mean that the reward is won by length.",
        r"sampling/.*": "The trainer's against the sampler's probability of the same "
        "tokens. They differ by rounding only.",
    },
    "Optimization": {
        r"(critic/)?(learning_rate|lr)": "Size of the optimizer's steps, by its "
        "schedule.",
        r"(critic/)?grad_norm": "Length of the gradient before it is clipped. Spikes "
        "go with odd rows or a too high learning rate.",
        r"(critic/)?skipped": "Updates left out since a loss or gradient was not "
        "finite. It should be 0.",
        r"beta": "Strength of the hold on the reference.",
    },
    "Speed": {
        r"step_time": "Seconds of a step. The first ones hold the compilation.",
        r"tokens_per_second": "Tokens a second, padding not counted.",
        r"mfu": "Share of the device's peak arithmetic that the model's products use.",
        r"num_tokens": "Tokens seen so far, padding not counted.",
        r"critic/num_tokens": "Tokens of an update of the critic, mean over an "
        "iteration, padding not counted.",
        r"eps": "Completions sampled and learned from in a second.",
        r"time/.*": "Seconds of an iteration that went into this part of it.",
        r"eval_num_.*": "How much was measured.",
    },
    "Other": {r".*": ""},
}
NOTES = tuple(
    Note(group, pattern, sentence)
    for group, entries in _GROUPS.items()
    for pattern, sentence in entries.items()
)


def note_of(name: str) -> Note:
    """The first note whose pattern is the whole of a metric's name."""
    return next(note for note in NOTES if re.fullmatch(note.pattern, name))
