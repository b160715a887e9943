"""Which method is for what: for a person who chooses one. `methods.py` says what each is."""

from __future__ import annotations

from msgspec import Struct


class Family(Struct, frozen=True, kw_only=True):
    """Methods that change a model in the same manner, and when that is the manner to take."""

    title: str
    when: str


class Guide(Struct, frozen=True, kw_only=True):
    """When to use a method, and what speaks against it."""

    family: str
    when: str
    but: str = ""


FAMILIES: dict[str, Family] = {
    "low-rank": Family(
        title="Low-rank adapters",
        when="the usual choice: near full tuning at a small share of its memory, and merged "
        "afterwards they cost nothing at inference",
    ),
    "few-numbers": Family(
        title="Adapters of few numbers",
        when="many tunings of one model have to be kept, or rows are few: files of kilobytes; "
        "activations take as much as beside LoRA, or more",
    ),
    "orthogonal": Family(
        title="Turned weights",
        when="what the model can do has to stay: angles between neurons are kept; slower than LoRA",
    ),
    "products": Family(
        title="Adapters of higher rank",
        when="a low rank does not hold what is to be learnt, and full tuning does not fit; they "
        "make matrices of the size of the weights in each step",
    ),
    "beside": Family(
        title="Networks beside the weights",
        when="small networks of their own; they cannot be merged, so inference pays for them",
    ),
    "prompts": Family(
        title="Prompts and prefixes",
        when="one served model has to do many tasks, each with learned tokens of its own; harder "
        "to train than LoRA, and they take places of the context",
    ),
    "own-weights": Family(
        title="The model's own weights",
        when="rows are many or far from what the model knows, and there is room; or a part of the "
        "weights is all that is to change",
    ),
}

GUIDE: dict[str, Guide] = {
    "lora": Guide(
        family="low-rank",
        when="nothing speaks for another one, and the base fits in 16 bits",
    ),
    "qlora": Guide(
        family="low-rank",
        when="the base does not fit in 16 bits: in 4 it takes a quarter",
        but="each step computes the weights from their 4 bits anew, which takes time",
    ),
    "dora": Guide(
        family="low-rank",
        when="ranks have to be low (its paper: ahead of LoRA most at ranks of 4 and 8)",
        but="norms of all weights are computed in each step: more memory and time than LoRA",
    ),
    "rslora": Guide(
        family="low-rank",
        when="the rank is 64 or more, where LoRA's scale of alpha / rank slows learning down",
    ),
    "pissa": Guide(
        family="low-rank",
        when="steps are few: it begins along the weights' main directions and falls faster",
        but="an SVD of each weight comes first; the base is changed with it",
    ),
    "loftq": Guide(
        family="low-rank",
        when="the base is quantized hard, and answers suffer from that: adapters begin with the "
        "difference",
        but="it needs the whole weights once, to know that difference",
    ),
    "lora-plus": Guide(
        family="low-rank",
        when="LoRA learns slowly on a wide model: B gets a higher learning rate, at no cost",
    ),
    "lora-fa": Guide(
        family="low-rank",
        when="activations are what does not fit: with A frozen, the inputs of adapted modules need "
        "not be kept",
        but="half as many numbers learn; raise the rank",
    ),
    "relora": Guide(
        family="low-rank",
        when="a long run should change weights by more than one low rank holds, as in continued "
        "pretraining",
        but="the base changes, so a whole model is saved; for runs of several cycles",
    ),
    "plora": Guide(
        family="low-rank",
        when="LoRA stops getting better before full tuning does, and memory is LoRA's",
        but="the base changes, so a whole model is saved",
    ),
    "lora-drop": Guide(
        family="low-rank",
        when="a small adapter matters: layers whose adapters do little share one",
        but="a first stage looks for these layers",
    ),
    "adalora": Guide(
        family="low-rank",
        when="a given number of parameters should go to where it helps: ranks differ by module",
        but="for runs long enough to find out; it begins with half as much rank again",
    ),
    "delora": Guide(
        family="low-rank",
        when="runs drift off at high learning rates: how far weights may move is bounded",
    ),
    "gralora": Guide(
        family="low-rank",
        when="the rank is high and LoRA overfits: each block of a weight has an adapter of its own",
    ),
    "lily": Guide(
        family="low-rank",
        when="adapters should be half as large: A and B are shared between layers",
    ),
    "poly": Guide(
        family="low-rank",
        when="rows are of several tasks that share skills: each task mixes adapters of its own",
        but="rows need a task; without one all are of the first",
    ),
    "glora": Guide(
        family="low-rank",
        when="biases and inputs should change along with weights",
    ),
    "ia3": Guide(
        family="few-numbers",
        when="rows are very few (its paper: some dozens) and the model knows the kind of task",
    ),
    "vera": Guide(
        family="few-numbers",
        when="LoRA's files are too large: a tenth of its parameters or less at the same rank",
        but="the shared random matrices take memory, though they are not saved",
    ),
    "pvera": Guide(
        family="few-numbers",
        when="VeRA's size, and a measure of how sure an answer is",
    ),
    "fourierft": Guide(
        family="few-numbers",
        when="LoRA's files are too large: some frequencies of each weight's change",
        but="each step makes whole changes of the weights, by an inverse transform",
    ),
    "waveft": Guide(
        family="few-numbers",
        when="as FourierFT, where what is to be learnt is local; made for images",
    ),
    "vblora": Guide(
        family="few-numbers",
        when="many adapters are stored: a bank of vectors and who takes which of them",
    ),
    "unilora": Guide(
        family="few-numbers",
        when="the smallest file of the LoRA family: one vector for all layers",
    ),
    "tinylora": Guide(
        family="few-numbers",
        when="reinforcement learning on a strong model: its paper found tens of numbers to do",
        but="too few to imitate answers by",
    ),
    "lokr": Guide(
        family="few-numbers",
        when="LoRA's files are too large and its rank too low: Kronecker products have a full one",
    ),
    "miss": Guide(
        family="few-numbers",
        when="LoRA is too slow or too large: one matrix instead of two, and less memory",
    ),
    "road": Guide(
        family="few-numbers",
        when="adapters of many users have to be served in one batch",
    ),
    "c3a": Guide(
        family="few-numbers",
        when="a full rank from few numbers is wanted: circulant blocks, multiplied by transforms",
    ),
    "oft": Guide(
        family="orthogonal",
        when="LoRA forgets too much of what the model could do",
    ),
    "boft": Guide(
        family="orthogonal",
        when="as OFT with fewer numbers",
        but="its factors are matrices as wide as the weights: far more memory than LoRA",
    ),
    "psoft": Guide(
        family="orthogonal",
        when="as OFT with next to no memory: turns within a small space",
    ),
    "hra": Guide(
        family="orthogonal",
        when="as OFT, with a rank to set how much may turn",
        but="reflections come one after the other, and each one's result is kept",
    ),
    "loha": Guide(
        family="products",
        when="LoRA's rank is too low: the product of two has its square",
    ),
    "randlora": Guide(
        family="products",
        when="a change of full rank should be learnt from few numbers",
    ),
    "hira": Guide(
        family="products",
        when="what is learnt needs a high rank, such as arithmetic and commonsense reasoning",
    ),
    "deft": Guide(
        family="products",
        when="some directions of a weight should be taken out and replaced",
    ),
    "peanut": Guide(
        family="products",
        when="the change should be a function of the weights themselves",
    ),
    "bottleneck": Guide(
        family="beside",
        when="you go on from work with Houlsby's adapters",
    ),
    "shadow": Guide(
        family="beside",
        when="the tuned part should be a model of its own, to be carried elsewhere",
        but="it is as large as some layers; `--exact` alone tells its memory",
    ),
    "prompt-tuning": Guide(
        family="prompts",
        when="the model is large (its paper: from about 10 billion parameters as good as tuning)",
        but="small models hardly learn by it; it takes high learning rates and many steps",
    ),
    "p-tuning": Guide(
        family="prompts",
        when="prompt tuning is unstable: a small network makes the prompt",
    ),
    "multitask-prompt-tuning": Guide(
        family="prompts",
        when="prompts for several tasks share what is common to them",
        but="rows need a task; without one all are of the first",
    ),
    "prefix-tuning": Guide(
        family="prompts",
        when="answers are to be written in a manner or format",
        but="layers cannot be checkpointed beside it",
    ),
    "p-tuning-v2": Guide(
        family="prompts",
        when="prompts should work on small models, too: each layer has its own",
        but="layers cannot be checkpointed beside it",
    ),
    "cartridge": Guide(
        family="prompts",
        when="one long document is asked about again and again: its cache is learnt once",
        but="layers cannot be checkpointed beside it",
    ),
    "adaption-prompt": Guide(
        family="prompts",
        when="you go on from LLaMA-Adapter; gates at zero leave the model as it was at first",
    ),
    "full": Guide(
        family="own-weights",
        when="rows are too many for an adapter, or the language or domain is new to the model",
        but="17.5 bytes a parameter; it forgets more than adapters do (arXiv 2405.09673)",
    ),
    "freeze": Guide(
        family="own-weights",
        when="backward should stop early: it does not go below the first trained layer",
    ),
    "bitfit": Guide(
        family="own-weights",
        when="rows are few and the model has biases (GPT-2, Qwen 2) or a switch for them (Llama)",
    ),
    "ln-tuning": Guide(
        family="own-weights",
        when="a chat model is to learn another kind of input or a style, at next to no cost",
    ),
    "beft": Guide(
        family="own-weights",
        when="rows are few: BitFit for chosen projections, also of models without biases",
    ),
    "trainable-tokens": Guide(
        family="own-weights",
        when="new tokens are to be learnt and nothing else",
    ),
    "shira": Guide(
        family="own-weights",
        when="adapters are switched or added at serving time: 1 to 2 % of each weight",
        but="gradients of the whole weights are made in each step",
    ),
    "supertuning": Guide(
        family="own-weights",
        when="as SHiRA, the weights to train chosen by their size",
        but="gradients of the whole weights are made in each step",
    ),
    "osf": Guide(
        family="own-weights",
        when="tasks come one after the other, and the earlier ones are not to be forgotten",
        but="weights are held as their singular vectors: more memory than full tuning",
    ),
}
