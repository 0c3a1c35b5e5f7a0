"""Slow definitions in plain Python floats: what the papers' formulas say, one element at a time, without a tensor."""

import math
from decimal import Decimal, localcontext


def sigmoid_log(x):
    """log sigmoid(x), stable on both sides."""
    return -math.log1p(math.exp(-x)) if x > -30 else x - math.exp(x)


def log_sum_exp(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def log_softmax(logits):
    total = log_sum_exp(logits)
    return [x - total for x in logits]


def entropy(logits):
    return -sum(math.exp(x) * x for x in log_softmax(logits) if x > -700)


def mean(values):
    return sum(values) / len(values) if values else 0.0


def variance(values, ddof=0):
    m = mean(values)
    return sum((v - m) ** 2 for v in values) / (len(values) - ddof) if len(values) > ddof else 0.0


def whiten(values, shift_mean=True, ddof=0, eps=1e-8):
    """One flat list of the values that count."""
    m, scale = mean(values), 1 / math.sqrt(variance(values, ddof) + eps)
    return [(v - m) * scale + (0.0 if shift_mean else m) for v in values]


def gae(rewards, values, gamma, lam):
    """One response: A_t = sum_l (gamma lam)^l delta_{t+l}, written as the double sum of arXiv:1506.02438 eq. 16."""
    after = [*values, 0.0]
    delta = [rewards[t] + gamma * after[t + 1] - values[t] for t in range(len(rewards))]
    advantages = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(delta))) for t in range(len(delta))]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def bradley_terry(chosen, rejected, margin=0.0, probability=1.0, smoothing=0.0):
    lead = chosen - rejected - margin
    p = (1 - smoothing) * probability + smoothing * (1 - probability)
    return -p * sigmoid_log(lead) - (1 - p) * sigmoid_log(-lead)


def infonce(positive, negatives):
    return log_sum_exp([positive, *negatives]) - positive


def plackett_luce(scores, ranks):
    """Best of what is left, again and again; a tie says nothing about its own members."""
    return sum(
        log_sum_exp([scores[i], *(s for s, r in zip(scores, ranks, strict=True) if r > ranks[i])]) - scores[i]
        for i in range(len(scores))
    )


def token_rewards(logprobs, reference, score, kl_coef):
    """One response (Ziegler eq. 2, the charge paid token by token)."""
    rewards = [-kl_coef * (p - q) for p, q in zip(logprobs, reference, strict=True)]
    rewards[-1] += score
    return rewards


def ppo_policy(logprob, old, advantage, clip, dual_clip=None):
    ratio = math.exp(logprob - old)
    loss = -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
    return min(loss, -dual_clip * advantage) if dual_clip is not None and advantage < 0 else loss


def ppo_value(value, old, target, clip):
    plain = (value - target) ** 2
    if clip is None:
        return 0.5 * plain
    clipped = min(max(value, old - clip), old + clip)
    return 0.5 * max(plain, (clipped - target) ** 2)


def difference_gradient(function, values, step=1e-6):
    """Central differences of a function of a flat list of floats."""
    gradient = []
    for i in range(len(values)):
        up, down = list(values), list(values)
        up[i] += step
        down[i] -= step
        gradient.append((function(up) - function(down)) / (2 * step))
    return gradient


# --- preferences: w and l are log-ratios (or mean log-probabilities) of the chosen and the rejected response ---------


def sigmoid(x):
    return math.exp(sigmoid_log(x))


def dpo(w, r, beta, smoothing=0.0, probability=1.0):
    return bradley_terry(beta * w, beta * r, probability=probability, smoothing=smoothing)


def robust_dpo(w, r, beta, flips, probability=1.0):
    """The corrected loss of the label and of the other label, each with its share."""

    def one(d):
        return (-(1 - flips) * sigmoid_log(beta * d) + flips * sigmoid_log(-beta * d)) / (1 - 2 * flips)

    return probability * one(w - r) + (1 - probability) * one(r - w)


def ipo(w, r, tau, probability=1.0):
    return probability * (w - r - 1 / (2 * tau)) ** 2 + (1 - probability) * (r - w - 1 / (2 * tau)) ** 2


def slic(w, r, beta, probability=1.0):
    return probability * max(0.0, 1 - beta * (w - r)) + (1 - probability) * max(0.0, 1 - beta * (r - w))


def simpo(w, r, beta, gamma, probability=1.0):
    return -probability * sigmoid_log(beta * (w - r) - gamma) - (1 - probability) * sigmoid_log(beta * (r - w) - gamma)


def log_odds(a):
    """log(p / (1 - p)) of p = exp(a), in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        p = Decimal(a).exp()
        return float((p / (1 - p)).ln())


def orpo(w, r):
    return -sigmoid_log(log_odds(w) - log_odds(r))


def kto(h, kl, desirable, beta, good=1.0, bad=1.0):
    return good - good * sigmoid(beta * (h - kl)) if desirable else bad - bad * sigmoid(beta * (kl - h))


def r_dpo(w, r, extra_length, beta, alpha, probability=1.0):
    lead = beta * (w - r) + alpha * extra_length
    return -probability * sigmoid_log(lead) - (1 - probability) * sigmoid_log(-lead)


def apo_zero(w, r, beta):
    return 1 - sigmoid(beta * w) + sigmoid(beta * r)


def apo_down(w, r, beta):
    return sigmoid(beta * w) + 1 - sigmoid(beta * (w - r))


def exo(w, r, beta, smoothing, probability=1.0):
    """KL(q, p), over both outcomes."""
    p = (1 - smoothing) * probability + smoothing * (1 - probability)
    return sum(
        math.exp(log_q) * (log_q - math.log(share))
        for log_q, share in ((sigmoid_log(beta * (w - r)), p), (sigmoid_log(beta * (r - w)), 1 - p))
    )


def nca(w, r, beta):
    return -sigmoid_log(beta * w) - sigmoid_log(-beta * w) / 2 - sigmoid_log(-beta * r) / 2


def sppo(w, r, beta, probability=1.0):
    target = (probability - 0.5) / beta
    return (w - target) ** 2 + (r + target) ** 2


def kl(log_q, log_p):
    """KL(q || p) of two lists of log-probabilities."""
    return sum(math.exp(a) * (a - b) for a, b in zip(log_q, log_p, strict=True) if a > -700)


def bco(h, shift, desirable, beta):
    return -sigmoid_log(beta * h - shift) if desirable else -sigmoid_log(shift - beta * h)


def tdpo(w, r, kl_w, kl_r, beta, alpha):
    return -sigmoid_log(beta * (w - r - alpha * (kl_r - kl_w)))


def exponential(x):
    """e^x, and above 30 its tangent there."""
    return math.exp(x) if x <= 30 else math.exp(30) * (x - 29)


F_SLOPES = {
    "reverse_kl": lambda h: h,
    "js": lambda h: math.log(2) + sigmoid_log(h),
    "forward_kl": lambda h: 1 - exponential(-h),
    "alpha": lambda h, a: (1 - exponential(-a * h)) / a,
}


def fdpo(w, r, beta, divergence, *alpha, probability=1.0):
    lead = beta * (F_SLOPES[divergence](w, *alpha) - F_SLOPES[divergence](r, *alpha))
    return -probability * sigmoid_log(lead) - (1 - probability) * sigmoid_log(-lead)


# --- groups of sampled responses: lists of one number a response, or of one list of tokens a response ----------------


def leave_one_out(scores):
    n = len(scores)
    return [s - mean([*scores[:i], *scores[i + 1 :]]) if n > 1 else 0.0 for i, s in enumerate(scores)]


def z_scores(scores, eps, ddof=1):
    m, scale = mean(scores), math.sqrt(variance(scores, ddof)) + eps
    return [0.0 if len(set(scores)) == 1 else (s - m) / scale for s in scores]


def k3(p, q):
    """Of log-probabilities: ref/pi - log(ref/pi) - 1."""
    return math.exp(q - p) - (q - p) - 1


def clipped(ratio, advantage, low, high):
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def overlong(length, longest, buffer):
    """DAPO eq. 13, case by case."""
    if length <= longest - buffer:
        return 0.0
    return (longest - buffer - length) / buffer if length <= longest else -1.0
