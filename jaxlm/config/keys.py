"""Every key of the config once, with its default and its reason, and the words that some of them may be."""

from ml_collections import ConfigDict

from jaxlm.config.attention_kernels import ATTENTION_KERNELS
from jaxlm.config.tasks import TASKS

COUNTED = ("ngram",)  # models that are counted, not trained: jaxlm.models.FITS
GATED = ("swiglu",)  # of model.mlp: those with a gate
MESH_AXES = ("data", "fsdp", "stage", "expert", "sequence", "tensor")
STRATEGIES = {  # mesh.strategy -> the axis that takes the devices left over
    "data": "data",
    "zero1": "data",  # and the optimizer's state is sharded over it
    "fsdp": "fsdp",
    "tensor": "tensor",
    "sequence": "sequence",
    "expert": "expert",
}
ATTENDING = ("decoder", "encoder", "encoder_decoder")  # models with attention heads
# As sacrebleu's BLEU.TOKENIZERS has them; zh, ja-mecab and ko-mecab divide what has no spaces, char every character.
BLEU_TOKENIZERS = (
    "13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "none", "spm", "flores101", "flores200", "spBLEU-1K"
)  # fmt: skip
CHOICES = {
    "task.name": tuple(TASKS),
    "task.class_weights": ("none", "balanced"),
    "model.name": tuple(
        "decoder encoder encoder_decoder lstm bilstm lstm_seq2seq ngram bag vectors".split()
    ),
    "model.ngram_weights": ("none", "log_count_ratio"),
    "model.cross_attention": ("dot", "additive", "bilinear"),
    "model.norm": ("rms", "layer"),
    "model.norm_place": ("pre", "post"),
    "model.pooling": ("mean", "sum", "max", "first", "last"),
    "model.mlp": ("swiglu", "gelu", "relu", "relu2"),
    "model.positions": ("rope", "learned", "sinusoidal", "none"),
    "model.remat": ("none", "full", "dots", "attention"),
    "model.attention": ("auto", *ATTENTION_KERNELS),
    "model.context_parallel": ("ring", "all_gather"),
    "model.router": ("softmax", "sigmoid"),
    "model.quantize": ("none", "fp8", "int8"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "train.accumulation_dtype": ("float32", "bfloat16"),
    "mesh.strategy": tuple(STRATEGIES),
    "mesh.across": ("data", "fsdp", "stage"),
    "optim.name": ("sgd", "adam", "adamw", "adafactor", "lion", "muon"),
    "eval.bleu_tokenize": BLEU_TOKENIZERS,
    "optim.rounding": ("nearest", "stochastic"),
    "optim.schedule": ("constant", "linear", "cosine", "wsd", "inverse_sqrt"),
}


def base() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # parameters, dropout and the order of data all follow from it

    c.task = k = ConfigDict()
    k.name = "lm"  # what is learned: a task of jaxlm/config/tasks.py
    k.mask_rate = 0.15  # mlm, span_corruption: part of the tokens that is hidden (BERT, T5: 0.15)
    k.whole_words = False  # mlm: hide all pieces of a word, or none
    k.span_length = 3.0  # span_corruption: mean tokens of a hidden span
    k.fim_rate = 0.5  # fim: part of the documents whose middle is moved to their end
    k.window = 5  # skipgram, glove: words to either side that belong to a word's context
    # skipgram: words drawn by their counts^0.75 that the true one is told apart from (Mikolov et al. 2013: 5 to 20 for
    # small data, 2 to 5 for large); 0: a softmax over the whole vocabulary instead.
    k.negatives = 0
    # skipgram: a word of share f of the text is left out with probability 1 - sqrt(subsample / f); 0: none is
    k.subsample = 0.0
    k.x_max = 100.0  # glove: the count from which on a pair weighs 1 (Pennington et al. 2014)
    # part of the target's probability that is spread over all (Szegedy et al. 2016)
    k.label_smoothing = 0.0
    k.class_weights = "none"  # none | balanced (each class counts alike, however rare)
    k.balanced_sampling = False  # rare classes are shown as often as the commonest
    k.focal = 0.0  # focusing exponent of the focal loss (Lin et al. 2017); 0: cross-entropy
    k.teacher = ""  # distillation and dpo: run directory of the model to learn from; dpo: "" is train.init_from
    k.teacher_model = ()  # its model section; filled in
    # weight of the divergence from the teacher; 1 - distill: that of the task's own loss
    k.distill = 0.0
    k.temperature = 1.0  # of teacher and student in distillation (Hinton et al. 2015)
    k.beta = 0.1  # dpo: how far to stay with the reference (Rafailov et al. 2023)

    c.model = m = ConfigDict()
    m.name = "decoder"  # decoder | encoder | encoder_decoder | lstm | bilstm | lstm_seq2seq | ngram | bag | vectors
    m.num_layers = 6  # blocks of attention and MLP
    m.embed_dim = 384  # width of the residual stream
    m.num_heads = 6  # query heads
    m.num_kv_heads = 0  # key and value heads (grouped-query attention); 0: as num_heads
    m.head_dim = 0  # 0: embed_dim / num_heads
    m.mlp_dim = 0  # hidden width of the MLP; 0: 4 x embed_dim, or 8/3 x embed_dim to a multiple of 64 for swiglu
    m.vocab_size = 0  # 0: as the tokenizer; larger is allowed (padding for even shards)
    # furthest a token looks back, and the table length of learned positions; 0: data.seq_len
    m.context_length = 0
    m.norm = "rms"  # rms | layer
    m.norm_place = "pre"  # pre | post (after the residual sum, as in 2017)
    m.norm_eps = 1e-6  # added to the variance (Llama and GPT-2: 1e-5)
    m.mlp = "swiglu"  # swiglu | gelu | relu | relu2
    m.num_experts = 0  # experts of each MLP (mixture of experts); 0: dense
    m.experts_per_token = 2  # experts that each token is sent to
    m.expert_dim = 0  # hidden width of each; 0: as mlp_dim
    m.shared_experts = 0  # experts that every token goes to, as one MLP of their summed width
    m.capacity_factor = 0.0  # an expert takes this x its even share of a row's tokens and drops others; 0: drops none
    # softmax | sigmoid (scores one by one, choice by score + bias: DeepSeek-V3)
    m.router = "softmax"
    m.balance_loss = 0.01  # weight of the loss that spreads each row's tokens over the experts
    m.router_z_loss = 0.0  # weight of log(Z)^2 of the router (ST-MoE: 1e-3)
    # step of the routers' bias towards an even load (DeepSeek-V3: 1e-3); 0: no bias
    m.balance_rate = 0.0
    m.positions = "rope"  # rope | learned | sinusoidal | none
    m.rope_theta = 10_000.0  # base of the rotary wavelengths
    # pattern repeated over the layers: L looks at the whole context, S at `window` tokens
    m.layers = "L"
    m.window = 256  # tokens that an S layer sees, itself included
    m.qk_norm = False  # RMS norm of queries and keys, steadies large learning rates
    m.bias = False  # biases in linear layers (GPT-2 has them, most later models do not); glove: of words, filled in
    m.tie_embeddings = True  # one table for input and output
    m.logit_softcap = 0.0  # c * tanh(logits / c); 0: off
    m.attention_softcap = 0.0  # the same on attention logits; 0: off
    m.scale_embeddings = False  # times sqrt(embed_dim), as in 2017
    m.hidden_dim = 0  # LSTMs: width of the state; 0: embed_dim
    # LSTMs: how a decoder scores the encoder's positions: dot | additive | bilinear
    m.cross_attention = "dot"
    m.recurrent_dropout = 0.0  # LSTMs: on the recurrent state, the same mask at every step
    m.encoder_layers = 0  # encoder_decoder: blocks of the encoder; 0: as num_layers
    m.num_labels = 0  # outputs of a head for classes, tags, spans or numbers; 0: as the task and its data ask for
    m.pooling = "mean"  # mean | sum | max | first | last: of an example's tokens, for its label
    m.lora_rank = 0  # width of low-rank adapters beside frozen weights (LoRA); 0: none
    m.lora_alpha = 16.0  # they count alpha / rank times
    m.lora_targets = "query|value"  # regex of the linear maps that get one
    m.order = 6  # ngram, bag: tokens of the longest n-gram; ngram predicts the last of them
    m.embed_ngrams = 1  # decoder, encoder: tokens of the longest run that has an embedding of its own; 1: tokens alone
    m.buckets = 131_072  # bag, embed_ngrams: rows of the table of n-grams, which are found in it by their hash
    # bag, classify: none | log_count_ratio (of an n-gram in the classes; NBSVM)
    m.ngram_weights = "none"
    m.discount = 0.0  # ngram: taken from each count; 0: three, estimated (Chen & Goodman 1998)
    m.ngrams = ()  # how many of each length are stored; filled in
    m.dropout = 0.0  # on embeddings and on each block's output
    m.embed_dropout = -1.0  # on embeddings alone; -1: as dropout
    # standard deviation of the initial embeddings; matrices start at 1 / sqrt(inputs)
    m.embed_std = 0.02
    m.scan = True  # one compiled layer for all: fast compiles; False unrolls, faster on CPU
    # rounds of layers in the body of that loop: more can overlap, and take longer to compile
    m.scan_unroll = 1
    m.remat = "none"  # what the backward pass recomputes: none | full | dots (all but products) | attention
    m.attention = "auto"  # auto | a key of jaxlm.config.attention_kernels.ATTENTION_KERNELS
    # how attention meets the keys of other devices (mesh.sequence): ring | all_gather
    m.context_parallel = "ring"
    # parts of a microbatch in flight over mesh.stage; 0: up to 4 a stage
    m.pipeline_microbatches = 0
    # times that each passes through all stages; more: less bubble, more transfers (circular)
    m.pipeline_rounds = 1
    # products of linear layers in 8 bits, forward and backward: none | fp8 | int8
    m.quantize = "none"
    m.dtype = "bfloat16"  # of the computation
    m.param_dtype = "float32"  # of the stored parameters

    c.data = d = ConfigDict()
    d.path = ""  # a directory made by jaxlm.data.prepare
    d.mixture = ""  # instead of path: "DIR=0.7,DIR=0.3", sampled with these weights
    d.train = ""  # tasks from examples: their files, .tsv .csv .jsonl .parquet .conll or a.de+b.en in parallel
    d.val = ""  # the same, to evaluate on
    d.columns = ""  # "text=sentence label=gold" or, by place, "text=0 label=3"; "": by name, or in the task's order
    d.tokenizer = "sentencepiece"  # words | sentencepiece | bytes | chars, made from data.train; or a file or directory
    d.vocab_size = 8000  # of the tokenizer that is made (words, sentencepiece)
    d.min_count = 1  # words: rarer ones are unknown
    d.lowercase = False  # the text of examples, also when writing
    d.labels = ()  # names of the classes or tags, in the order of their ids; (): those in data.train, sorted
    d.pack = True  # several examples in a row of a batch
    d.examples_per_row = 0  # at most; 0: as many as there may be
    d.word_dropout = 0.0  # part of the input tokens that is made unknown in training
    d.seq_len = 256  # tokens in one row of a batch; with a source: of the target
    d.enc_len = 0  # tokens of the sources in a row; 0: as seq_len
    d.shuffle = True  # rows in a fresh random order each epoch
    d.isolate = True  # documents packed into one row do not see each other (segments)
    d.prefetch = 2  # batches made ahead, in the background

    c.train = t = ConfigDict()
    t.init_from = ""  # run directory whose parameters, model section and tokenizer are the start
    t.steps = 1000  # length of the run and of the schedule
    t.batch_size = 32  # rows in one optimizer step, over all devices
    t.grad_accumulation = 1  # microbatches a step: less memory, the same result
    # of the sum of their gradients; bfloat16: half of its memory, rounded each time
    t.accumulation_dtype = "float32"
    t.stop_at = 0  # end cleanly after this step, leaving the schedule as it is; 0: at steps
    t.loss_chunk = 0  # positions whose logits exist at one time; 0: GPU 1 GiB of them, TPU 512 MiB, CPU up to 64
    t.z_loss = 0.0  # weight of log(Z)^2, keeps logits from drifting (PaLM: 1e-4)
    t.ema = 0.0  # decay of an average of the parameters, used for evaluation and generation; 0: off
    t.max_skipped = 20  # stop after this many steps in a row whose gradients were not finite

    c.optim = o = ConfigDict()
    o.name = "adamw"  # sgd | adam | adamw | adafactor | lion | muon (matrices by Muon, the rest by AdamW)
    o.learning_rate = 3e-4  # peak
    # constant | linear | cosine | wsd | inverse_sqrt, each after a linear warm-up
    o.schedule = "cosine"
    o.warmup_steps = -1  # steps from peak / warmup_steps up to the peak; -1: 5% of train.steps
    o.end_factor = 0.1  # final learning rate / peak (linear, cosine, wsd)
    o.cooldown_fraction = 0.2  # part of the run in which wsd decays
    # decoupled, times the learning rate; in sgd and adam a part of the gradient (L2)
    o.weight_decay = 0.1
    # Ordered (regex, factor of weight_decay); the first that is found in a parameter's name counts.
    o.decay = ((r"norm|bias|positions", 0.0), (r".*", 1.0))
    o.l1 = 0.0  # times sign(parameter), added to the gradient of what decay gives a factor above 0 (L1 penalty)
    # Ordered (regex, factor of learning_rate), as decay; 0 freezes: no gradient, no optimizer state, no decay.
    o.rates = ((r".*", 1.0),)
    o.layer_decay = 1.0  # multiplies the rate of the last layer once, the one before twice, ... (fine-tuning: 0.65-0.9)
    o.b1 = 0.9  # Adam, Lion: decay of the mean of gradients
    o.b2 = 0.95  # Adam: and of their squares (0.999 for small batches, 0.95 is steadier at large ones); Lion: 0.99
    o.eps = 1e-8  # added to the root of the squares
    o.clip = 1.0  # largest global norm of the gradients; 0: off
    o.adam_learning_rate = 0.0  # muon: peak for embeddings, norms and biases; 0: as learning_rate
    o.momentum = 0.95  # sgd (0: none), muon
    # of bfloat16 parameters and moments: nearest | stochastic (small updates add up)
    o.rounding = "nearest"
    o.nesterov = False  # sgd: step along gradient + momentum x the new sum, a look ahead

    # devices along each axis; 0: 1, or for the strategy's axis (then data) the devices left
    c.mesh = ConfigDict()
    # which axis takes them: data | zero1 | fsdp | tensor | sequence | expert
    c.mesh.strategy = "data"
    c.mesh.data = 0  # copies of the parameters, each with its own rows (zero1: optimizer state split over them)
    c.mesh.fsdp = 0  # rows and parameters both sharded
    c.mesh.stage = 0  # pipeline stages: layers
    c.mesh.expert = 0  # experts; outside of them as fsdp
    c.mesh.sequence = 0  # positions (context parallel)
    c.mesh.tensor = 0  # heads, MLP and vocabulary; positions between the layers' products
    c.mesh.slices = 1  # groups of devices joined by a slower network; where devices know their slice, that counts
    c.mesh.across = "data"  # the axis that spans the slices: data | fsdp | stage

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 1000  # steps; the last step is always saved
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.checkpoint.keep_best = True  # and the one that is best by eval.metric

    c.eval = ConfigDict()
    c.eval.every = 250  # steps; 0: only by jaxlm.evaluate
    c.eval.batches = 0  # batches an evaluation; 0: the whole validation split
    c.eval.metric = "loss"  # of an evaluation: what the best checkpoint and patience go by
    c.eval.patience = 0  # stop after this many evaluations without a new best; 0: never
    # tasks that write texts: examples scored at each evaluation (BLEU, chrF, ROUGE)
    c.eval.generate = 0
    c.eval.max_tokens = 0  # of an answer; 0: data.seq_len
    c.eval.beams = 1  # hypotheses of a beam search; 1: greedy
    # exponent of the length that a beam's score is divided by (Wu et al. 2016)
    c.eval.length_penalty = 0.6
    # sacrebleu's, the usual one of papers; zh, ja-mecab, ko-mecab or char without spaces
    c.eval.bleu_tokenize = "13a"

    c.log = ConfigDict()
    c.log.every = 10  # steps between rows of metrics.jsonl
    c.log.tensorboard = True  # when tensorboardX is installed
    c.log.trackers = ""  # besides: "wandb,mlflow,trackio", any of them; each is an extra (pip install -e ".[wandb]")
    return c.lock()
