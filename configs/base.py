"""The default run, and every key there is: a small GPT on the source code of the Python standard library.

    python -m llmjax.main --config=configs/base.py

Ends at 1.53 bits per byte of held-out text (gzip 1.99, xz 1.76) after 3.5 minutes on 2 cores of an AMD EPYC, at 9
thousand tokens per second (2026-11-23, Python 3.11, whose library is the text).

Other configs are short diffs over this one. Any key can be set on the command line, for example
`--config.model.num_layers=8`. A 0 or an empty string means "derived" where the comment says so.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of initialisation, data order and dropout

    c.model = model = ConfigDict()
    model.family = "gpt"  # gpt: a decoder-only Transformer
    model.num_layers = 4  # L
    model.model_dim = 128  # D, width of the residual stream
    model.num_heads = 4  # query heads
    model.num_kv_heads = 0  # key/value heads: 0 = num_heads, 1 = multi-query, between = grouped-query
    model.head_dim = 0  # 0 = model_dim / num_heads
    model.mlp_dim = 0  # 0 = 4 x model_dim, with swiglu 8/3 x model_dim rounded up to a multiple of 64
    model.activation = "swiglu"  # swiglu | gelu | relu2
    model.norm = "rmsnorm"  # rmsnorm | layernorm
    model.norm_eps = 1e-6  # added to the variance
    model.position = "rope"  # rope | learned | sinusoidal
    model.rope_theta = 10000.0  # base wavelength of the rotary embedding
    model.rope_scaling = "none"  # to texts longer than those trained on: none | linear | ntk | yarn | llama3
    model.rope_factor = 1.0  # of rope_scaling: new length / original length
    model.rope_original_len = 0  # the T trained at before; for yarn and llama3
    model.qk_norm = True  # RMSNorm of queries and keys, per head
    model.use_bias = False  # biases in linear layers and LayerNorm
    model.tie_embeddings = True  # the output matrix is the embedding
    model.logit_softcap = 0.0  # c * tanh(logits / c); 0 = off
    model.window = 0  # positions that a token attends to, itself included; 0 = all before it
    model.global_every = 0  # every n-th layer is without the window; 0 = none
    model.attention_softcap = 0.0  # c * tanh(scores / c); 0 = off
    model.attention_sinks = False  # a learned score per head in the softmax, for attending to nothing
    model.dropout = 0.0  # on embeddings and residual branches; 0 = off
    model.init_std = 0.02  # of all matrices; residual outputs get init_std / sqrt(2 x num_layers)
    model.dtype = "float32"  # float32 | bfloat16, of the computation; parameters, softmax and loss: float32

    c.task = task = ConfigDict()
    task.name = "language_model"  # language_model: predict the next token | copy: write the document again

    c.tokenizer = tokenizer = ConfigDict()
    tokenizer.kind = "bpe"  # bpe | unigram | byte
    tokenizer.path = ""  # an existing SentencePiece .model, used as it is
    tokenizer.vocab_size = 4096  # V, special and byte pieces included
    tokenizer.train_bytes = 20_000_000  # how much of the corpus the tokenizer is trained on
    tokenizer.character_coverage = 0.9995  # share of characters with their own piece; the rest: bytes
    tokenizer.num_reserved = 16  # ids kept free for later special tokens

    c.data = data = ConfigDict()
    data.sources = ("stdlib",)  # files, directories, globs: .txt .md .py ... .jsonl(.gz|.zst) .parquet
    data.text_field = "text"  # of JSON lines and Parquet rows
    data.on_bad_text = "error"  # invalid UTF-8: error | skip | replace
    data.seq_len = 512  # T, tokens per packed sequence
    data.source_len = 0  # S, tokens of its second stream, if the task has one; 0 = seq_len
    data.length_points = ()  # rows cut shorter as tokens are seen: TOKENS_SEEN:LENGTH, ...; the first is 0:...
    data.held_out_fraction = 0.03  # of the documents, by hash of their text
    data.cache_dir = ""  # tokenizers and token stores; "" = $XDG_CACHE_HOME/llmjax or ~/.cache/llmjax
    data.num_workers = 0  # processes that tokenize; 0 = one per core
    data.prefetch = 2  # micro-batches made ahead of the step

    c.mesh = mesh = ConfigDict()
    mesh.data = -1  # batch; -1 = all devices that the other axes leave
    mesh.fsdp = 1  # batch and parameters
    mesh.seq = 1  # positions of each sequence
    mesh.tensor = 1  # heads, feed-forward, vocabulary
    mesh.seq_attention = "auto"  # over seq: auto | gather | ring | ulysses | hybrid
    mesh.ulysses = 0  # devices that trade heads in hybrid; 0 = as many as there are key/value heads for
    mesh.layout = "auto"  # tokens on devices of seq: auto | contiguous | zigzag | striped | documents

    # How the work is cut: like mesh, this changes time and memory, and no number.
    c.compute = compute = ConfigDict()
    compute.micro_batch_size = 0  # sequences per micro-step, all devices; 0: from accumulation_steps
    compute.accumulation_steps = 2  # micro-steps per update; 0 = follows from micro_batch_size
    compute.engine = "in_place"  # in_place | multisteps (optax, the reference) | fused (a call an update)
    compute.gather = "micro_step"  # micro_step | update: how often fused gathers weights over mesh.fsdp
    compute.scan_layers = False  # one compiled layer, scanned: quick to compile, slower on CPU
    compute.remat = "none"  # what the backward pass does again: none | dots | attention (all but it) | full
    compute.offload = ()  # to the host's memory, of what remat keeps: residual (inputs of layers), attention
    compute.offload_optimizer = False  # the optimizer's state to the host's memory between updates
    compute.tile = 0  # tokens of a device that the token-wise parts of layers take at a time; 0 = all
    compute.kernel = "auto"  # of attention: auto | full | blockwise | pallas (of a GPU or TPU)

    c.train = train = ConfigDict()
    train.num_updates = 400  # optimizer updates of the whole run
    train.tokens_per_update = 4096  # sequences x seq_len x micro-steps
    train.batch_schedule = "constant"  # constant | piecewise | linear: tokens per update as tokens are seen
    train.batch_points = ()  # of the schedule: TOKENS_SEEN:TOKENS_PER_UPDATE, ...; the first is 0:...
    train.z_loss = 0.0  # weight of log(Z)^2 in the gradient; reported as z_loss, never within the loss
    train.statistics_every = 0  # updates between per-layer statistics of gradients and activations; 0 = off

    c.optimizer = optimizer = ConfigDict()
    optimizer.name = "muon"  # adamw | lion | adafactor | muon | schedule_free_adamw
    optimizer.learning_rate = 1e-2  # at the peak
    optimizer.schedule = "cosine"  # cosine | linear | constant | wsd
    optimizer.schedule_updates = 0  # of the schedule, warmup and decay included; 0 = train.num_updates
    optimizer.warmup_updates = 40  # of linear rise to the peak
    optimizer.final_lr_fraction = 0.1  # of the peak, at the last update of the schedule
    optimizer.decay_fraction = 0.2  # of the schedule, for wsd: the linear decay at the end
    optimizer.weight_decay = 0.1  # not on norms and biases
    optimizer.clip = "global"  # global | block (each layer by itself) | adaptive (by the norm of the weights)
    optimizer.clip_norm = 1.0  # largest gradient norm; adaptive: / weight norm, 0.01 to 0.16; 0 = off
    optimizer.batch_scaling = "none"  # learning rate times this power of the batch: none | sqrt | linear
    optimizer.constant_in = "updates"  # updates | tokens: per which all decays, weight_decay too, are fixed

    # One section for each optimizer. A key of an optimizer that the run does not use may not be changed.
    c.adamw = adamw = ConfigDict()
    adamw.beta1 = 0.9  # decay of the first moment, per update
    adamw.beta2 = 0.95  # decay of the second moment, per update
    adamw.eps = 1e-8  # added to the root of the second moment

    c.lion = lion = ConfigDict()
    lion.beta1 = 0.9  # weight of the momentum, against the newest gradient, in the sum whose sign is the step
    lion.beta2 = 0.95  # decay of the momentum, per update

    c.adafactor = adafactor = ConfigDict()
    adafactor.momentum = 0.9  # decay of the momentum, per update; 0 saves its memory
    adafactor.decay_cap = 0.95  # largest decay of the second moment, per update

    # Muon trains the matrices inside the network; embeddings, output head, norms and biases: AdamW, by the keys above.
    c.muon = muon = ConfigDict()
    muon.momentum = 0.95  # decay of the momentum, per update
    muon.form = "debiased"  # debiased | reference: bias-corrected momentum, or as Jordan's own code

    c.schedule_free_adamw = schedule_free_adamw = ConfigDict()
    schedule_free_adamw.beta1 = 0.9  # weight of the average in the parameters at which gradients are taken
    schedule_free_adamw.beta2 = 0.95  # decay of the second moment, per update
    schedule_free_adamw.eps = 1e-8  # added to the root of the second moment

    c.controller = controller = ConfigDict()
    controller.name = "none"  # none | noise_scale | norm_test: what decides accumulation_steps
    controller.k_min = 1  # micro-steps per update, at least
    controller.k_max = 64  # and at most
    controller.half_life = 200_000  # tokens after which a measurement counts half
    controller.hysteresis = 0.25  # of k, by which the wanted k must differ before it changes
    controller.batch_per_noise = 1.0  # wanted batch / gradient noise scale, both in target tokens
    controller.norm_test_theta = 0.5  # noise / gradient that norm_test lets pass

    c.stability = stability = ConfigDict()
    stability.on_spike = "warn"  # of loss or gradient: none | warn | skip (it) | rewind (to a checkpoint)
    stability.threshold = 6.0  # standard deviations above the running level that make a spike
    stability.half_life = 200_000  # tokens after which a value counts half in the level
    stability.warmup_updates = 50  # before which nothing is a spike
    stability.max_skips = 20  # updates skipped in a row at which the run stops

    c.evaluate = evaluate = ConfigDict()
    evaluate.every = 100  # updates between evaluations on the held-out documents; 0 = only at the end
    evaluate.batch_size = 0  # sequences per step; 0 = the micro-batch size
    evaluate.probes = ()  # of long context, at the end: position, context, passkey, needle, copy
    evaluate.probe_lengths = ()  # tokens of their texts, also above seq_len; () = 1, 16, 32, 64, ... seq_len

    c.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 100  # updates between checkpoints; 0 = only at the end
    checkpoint.keep = 2  # the newest checkpoints to keep; the newest known to give a finite loss stays too
    checkpoint.keep_best = True  # and the one with the lowest held-out loss
    checkpoint.init_from = ""  # workdir of a run whose parameters and tokenizer a new run begins with
    checkpoint.init_checkpoint = "latest"  # which of its checkpoints: latest | best | the number of an update

    c.generate = generate = ConfigDict()
    generate.max_tokens = 200  # new tokens per prompt, at most
    generate.temperature = 0.8  # 0 = greedy
    generate.top_k = 0  # 0 = off
    generate.top_p = 0.95  # 1 = off
    generate.seed = 0  # of the sampling

    c.plan = plan = ConfigDict()
    plan.topology = ""  # compile for this TPU (v5p:4x4x4; v5e:4x4*2 = two slices), not the devices at hand

    return c.lock()
