"""The default run, and every key there is: a small GPT on the source code of the Python standard library.

    python -m llmjax.main --config=configs/base.py

Ends at 1.53 bits per byte of held-out text (gzip 1.99, xz 1.76) after 3.5 minutes on 2 cores of an AMD EPYC, at 9
thousand tokens per second (2026-11-23, Python 3.11, whose library is the text).

Other configs are short diffs over this one. Any key can be set on the command line, for example
`--config.model.num_layers=8`. Capital letters are the names of dimensions, as in `llmjax/types.py`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # decides the initial parameters, the order of the data and the dropout

    c.model = model = ConfigDict()
    model.family = "gpt"  # gpt: a decoder | bert: an encoder | encoder_decoder | lstm: a recurrent network
    model.num_layers = 4  # L
    model.model_dim = 128  # D, width of the embeddings and the residual stream
    model.tie_embeddings = True  # uses the embedding as the output matrix
    model.logit_softcap = 0.0  # c * tanh(logits / c); 0 = off
    model.dropout = 0.0  # share dropped from embeddings and from what layers put out; 0 = off
    model.init_std = 0.02  # standard deviation of matrices; gpt: of residual outputs / sqrt(2 x num_layers)
    model.dtype = "float32"  # float32 | bfloat16, of the computation; parameters, softmax, loss: float32

    # The layers of a Transformer, for all families but lstm. As with the optimizers below: a key of a family that
    # the run does not use may not be changed.
    c.transformer = transformer = ConfigDict()
    transformer.num_heads = 4  # N, the query heads
    transformer.num_kv_heads = 0  # K, key/value heads; 0 = num_heads, 1 = multi-query, between: grouped
    transformer.head_dim = 0  # H, the width of a head; 0 = model_dim / num_heads
    transformer.mlp_dim = 0  # F; 0 = 4 D, or for swiglu 8/3 D rounded up to a multiple of 64
    transformer.activation = "swiglu"  # swiglu | geglu | gelu (tanh) | gelu_erf (exact) | silu | relu | relu2
    transformer.norm = "rmsnorm"  # rmsnorm | layernorm
    transformer.norm_eps = 1e-6  # added to the variance
    transformer.position = "rope"  # rope | learned | sinusoidal | relative (a bias, as in T5) | alibi | none
    transformer.rope_theta = 10000.0  # base of the wavelengths of rope
    transformer.local_rope_theta = 0.0  # base in layers with a window, without scaling; 0 = rope_theta
    transformer.rope_scaling = "none"  # for longer texts than before: none | linear | ntk | yarn | llama3
    transformer.rope_factor = 1.0  # new length / old length, for rope_scaling
    transformer.rope_original_len = 0  # the T trained at before, for rope_scaling yarn and llama3
    transformer.relative_buckets = 32  # the buckets of distances that relative positions have a bias for
    transformer.relative_distance = 128  # from this distance on, tokens share the last bucket
    transformer.qk_norm = True  # RMSNorm of queries and keys, per head
    transformer.qk_norm_over = "head"  # what qk_norm averages over: head | all heads together
    transformer.norm_at = "input"  # of each layer: input | output | both | sum: of x + layer(x)
    transformer.scale_embedding = False  # multiplies embedded tokens by the root of model_dim
    transformer.score_dim = 0  # attention scores are divided by the root of this; 0 = head_dim
    transformer.use_bias = False  # gives linear layers and LayerNorm a bias
    transformer.qkv_bias = False  # gives queries, keys and values a bias, and nothing else
    transformer.window = 0  # positions that a token attends to, itself included; 0 = all before it
    transformer.global_every = 0  # every n-th layer has no window; 0 = all layers have it
    transformer.attention_softcap = 0.0  # c * tanh(scores / c); 0 = off
    transformer.attention_sinks = False  # adds a learned score per head to the softmax, for nothing

    # A mixture of experts in the place of the feed-forward layers of a Transformer.
    c.experts = experts = ConfigDict()
    experts.num_experts = 0  # E, the experts of a layer; 0 = a feed-forward layer
    experts.experts_per_token = 2  # J, the experts that a token goes through
    experts.expert_dim = 0  # F, the hidden width of an expert; 0 = transformer.mlp_dim
    experts.shared_experts = 0  # further experts that every token goes through; 0 = none
    experts.normalize_gates = True  # makes the weights of a token's experts sum to 1
    experts.balance_loss = 0.01  # coefficient of the loss term for an even load in each row; 0 = off
    experts.router_z_loss = 0.001  # coefficient of log(Z)^2 of the router; 0 = off

    c.bert = bert = ConfigDict()
    bert.transform = True  # a dense layer, an activation and a norm before the output matrix
    bert.token_types = 0  # embeddings of token types; a text has the first type throughout; 0 = none
    bert.embedding_norm = False  # a norm after the embedding, before the first layer
    bert.output_bias = False  # a bias for the logits of the tokens

    c.encoder_decoder = encoder_decoder = ConfigDict()
    encoder_decoder.encoder_layers = 0  # layers of the encoder; 0 = model.num_layers, those of the decoder
    encoder_decoder.scale_output = False  # divides the last states by the root of model_dim, as the first T5
    encoder_decoder.output_bias = False  # adds a learned bias to the logits, as Marian

    c.lstm = lstm = ConfigDict()
    lstm.hidden_dim = 0  # M, width of the hidden and the cell state of each layer; 0 = model_dim
    lstm.truncation = 0  # tokens over which gradients flow back; the state flows further; 0 = all

    c.task = task = ConfigDict()
    task.name = "language_model"  # see docs/families.md for the others

    c.masked_language_model = masked_language_model = ConfigDict()
    masked_language_model.rate = 0.15  # share of the tokens that are to be predicted
    masked_language_model.mask_share = 0.8  # share of these that the model reads as a mask
    masked_language_model.random_share = 0.1  # share of these that it reads as a random token; the rest stay
    masked_language_model.whole_words = False  # chooses all tokens of a word together

    # What is written is data.text_field.
    c.span_corruption = span_corruption = ConfigDict()
    span_corruption.rate = 0.15  # share of the tokens that are taken out of a text
    span_corruption.span_len = 3.0  # mean length of the spans that they are taken out in
    span_corruption.sentinels = 16  # reserved ids that stand for gaps, 100 for T5; longer texts are cut

    c.translation = translation = ConfigDict()
    translation.source_field = "source"  # the field of a record with the text that is translated
    translation.label_smoothing = 0.0  # share of each target that is spread over all ids in training; 0 = off

    # Conversations, lists of messages in data.text_field, of which the assistant's are learned.
    c.conversation = conversation = ConfigDict()
    conversation.format = "auto"  # plain | chatml | template: of the tokenizer | auto: the last it has
    conversation.system = ""  # the system message of conversations that have none; "" = none

    # Two answers to one prompt, of which people prefer the one in data.text_field.
    c.preference = preference = ConfigDict()
    preference.loss = "dpo"  # dpo | ipo | simpo | orpo; the first two compare with the model at the beginning
    preference.beta = 0.1  # how much a difference of log-probabilities counts; simpo: 2 to 10
    preference.margin = 0.0  # simpo: how much larger the reward of the better answer is to be
    preference.label_smoothing = 0.0  # dpo, simpo: the share of pairs taken to be the wrong way round
    preference.rejected_field = "rejected"  # the field with the other answer: a text, or a list of messages
    preference.prompt_field = "prompt"  # the field with the prompt; "" = both answers are whole conversations
    preference.format = "auto"  # of messages, as conversation.format
    preference.system = ""  # the system message of conversations that have none; "" = none

    # A label for every text. Texts of more than data.seq_len tokens are cut at the end, which the plan says.
    c.classification = classification = ConfigDict()
    classification.label_from = "field"  # field of a record | file (pos.txt.gz) | folder (pos/1.txt)
    classification.label_field = "label"  # the field with the label, in JSON, Parquet and tables
    classification.labels = ()  # the labels in their order; () = all that data.sources have, sorted
    classification.pool = "auto"  # what is looked at: last token | mean | first token; auto: last, bert: mean

    c.tokenizer = tokenizer = ConfigDict()
    tokenizer.kind = "bpe"  # bpe | unigram | byte
    tokenizer.path = ""  # one to use: .model, tokenizer.json, vocab.txt, .gguf, folder; "" = train one
    tokenizer.vocab_size = 4096  # V, with special and byte pieces
    tokenizer.train_bytes = 20_000_000  # bytes of the corpus that the tokenizer is trained on
    tokenizer.character_coverage = 0.9995  # share of characters with a piece of their own; the others: bytes
    tokenizer.num_reserved = 16  # ids kept free for special tokens to come

    c.data = data = ConfigDict()
    data.sources = ("stdlib",)  # files, folders, globs: text, JSON, .csv, .tsv (.gz .zst .bz2 .xz), Parquet
    data.text_field = "text"  # the field with the text, in JSON, Parquet, tables: a string or a list of lines
    data.columns = ()  # the names of the columns of .csv and .tsv files; () = their first line has them
    data.on_bad_text = "error"  # text not of the encoding, null, rows that lack cells: error | skip | replace
    data.encoding = "utf-8"  # of text, JSON and tables: utf-8, gb18030, big5, shift_jis, utf-16, latin-1 ...
    data.follow_links = False  # follows links that lead out of a folder which is searched
    data.max_expansion = 250  # times its size that a compressed file may unpack to; 16 MiB always may
    data.seq_len = 512  # T, the tokens of a packed sequence
    data.source_len = 0  # S, tokens of its second stream, if the task has one; 0 = seq_len
    data.length_points = ()  # shortens rows as tokens are seen: TOKENS_SEEN:LENGTH, ...; first 0:...
    data.split_on = ""  # cuts documents where this regular expression matches: CHAPTER, 第.*回, \n\s*\n
    data.held_out_fraction = 0.03  # share of the text held out, and never trained on; 0 = none
    data.hold_out = "auto"  # documents, by their hash | tails of each | auto: tails where documents are few
    data.held_out_sources = ()  # files, directories, globs to hold out instead of a share of the sources
    data.cache_dir = ""  # for tokenizers and token stores; "" = $XDG_CACHE_HOME/llmjax or ~/.cache/llmjax
    data.num_workers = 0  # processes that tokenize; 0 = one per core
    data.prefetch = 2  # micro-batches made ahead of the devices

    c.mesh = mesh = ConfigDict()
    mesh.data = -1  # splits the batch; -1 = all devices that the other axes leave
    mesh.fsdp = 1  # splits the batch and the parameters
    mesh.seq = 1  # splits the positions of each sequence
    mesh.tensor = 1  # splits heads, feed-forward and vocabulary
    mesh.seq_attention = "auto"  # attention over seq: auto | gather | ring | ulysses | hybrid
    mesh.ulysses = 0  # devices in a group that trades heads in hybrid; 0 = as many as key/value heads allow
    mesh.layout = "auto"  # tokens to devices of seq: auto | contiguous | zigzag | striped | documents

    # How the work is cut. Like mesh, this section changes time and memory, and no number.
    c.compute = compute = ConfigDict()
    compute.micro_batch_size = 0  # sequences per micro-step, all devices; 0 = follows from accumulation_steps
    compute.accumulation_steps = 2  # micro-steps per update; 0 = follows from micro_batch_size
    compute.engine = "in_place"  # in_place | multisteps (optax, the reference) | fused (one call per update)
    compute.gather = "micro_step"  # micro_step | update: how often the engine fused gathers weights over fsdp
    compute.scan_layers = False  # compiles one layer and scans it: quick to compile, slower on a CPU
    compute.remat = "none"  # what the backward pass repeats: none | dots | attention (all but it) | full
    compute.offload = ()  # kept values to put in the hosts' memory: residual (inputs of layers), attention
    compute.offload_optimizer = False  # keeps the optimizer's state in the hosts' memory between updates
    compute.tile = 0  # tokens per device that the token-wise parts of a layer take at a time; 0 = all
    compute.kernel = "auto"  # attention on a device: auto | full | blockwise | pallas (for a GPU or TPU)
    compute.compilation_cache_mb = 512  # of disk beside data.cache_dir for compiled programs; 0 = none

    c.train = train = ConfigDict()
    train.num_updates = 400  # optimizer updates in the whole run
    train.tokens_per_update = 4096  # sequences x seq_len x micro-steps
    train.batch_schedule = "constant"  # constant | piecewise | linear: tokens per update as tokens are seen
    train.batch_points = ()  # for batch_schedule: TOKENS_SEEN:TOKENS_PER_UPDATE, ...; the first is 0:...
    train.z_loss = 0.0  # weight of log(Z)^2 in the gradient; reported as z_loss, never within the loss
    train.frozen = ()  # parameters that stay as they are: embedding, attention, wq, layers:2 (the first 2) ...
    train.patience = 0  # ends the run after as many evaluations without a better score; 0 = never
    train.statistics_every = 0  # updates between statistics of each layer: gradients, activations; 0 = off

    # Fine-tuning with few parameters: matrices get small adapters, which alone train (see docs/fine_tuning.md).
    c.lora = lora = ConfigDict()
    lora.rank = 0  # R, the inner size of an adapter; 0 = off
    lora.alpha = 16.0  # adapters are multiplied by alpha / rank
    lora.rslora = False  # multiplies by alpha / sqrt(rank) instead
    lora.targets = ("all",)  # matrices that get adapters: all, attention, mlp, wq, layers/attention/w* ...
    lora.init_from = ""  # a folder of adapters of the library peft to begin with; "" = new ones

    c.optimizer = optimizer = ConfigDict()
    optimizer.name = "muon"  # adamw | lion | adafactor | muon | schedule_free_adamw
    optimizer.learning_rate = 1e-2  # at the peak of the schedule
    optimizer.schedule = "cosine"  # cosine | linear | constant | wsd
    optimizer.schedule_updates = 0  # length of the schedule with warmup and decay; 0 = train.num_updates
    optimizer.warmup_updates = 40  # updates in which the learning rate rises linearly to the peak
    optimizer.final_lr_fraction = 0.1  # learning rate at the schedule's last update / peak
    optimizer.decay_fraction = 0.2  # share of the schedule that wsd takes for its linear decay at the end
    optimizer.weight_decay = 0.1  # times the learning rate, per update; norms and biases do not decay
    optimizer.layer_decay = 1.0  # learning rate of a layer / of the one above it; fine-tuning: 0.65 to 0.95
    optimizer.clip = "global"  # global | block (each layer by itself) | adaptive (by the norm of the weights)
    optimizer.clip_norm = 1.0  # largest gradient norm; for adaptive: / weight norm, 0.01 to 0.16; 0 = off
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

    # For the matrices inside the network. Embeddings, output head, norms and biases follow the section adamw.
    c.muon = muon = ConfigDict()
    muon.momentum = 0.95  # decay of the momentum, per update
    muon.form = "debiased"  # debiased | reference: bias-corrected momentum, or as Jordan's own code

    c.schedule_free_adamw = schedule_free_adamw = ConfigDict()
    schedule_free_adamw.beta1 = 0.9  # weight of the average in the parameters at which gradients are taken
    schedule_free_adamw.beta2 = 0.95  # decay of the second moment, per update
    schedule_free_adamw.eps = 1e-8  # added to the root of the second moment

    c.controller = controller = ConfigDict()
    controller.name = "none"  # what decides the micro-steps per update: none | noise_scale | norm_test
    controller.k_min = 1  # the fewest micro-steps per update
    controller.k_max = 64  # the most micro-steps per update
    controller.half_life = 200_000  # tokens after which a measurement counts half
    controller.hysteresis = 0.25  # k changes when the wanted k differs from it by this fraction
    controller.batch_per_noise = 1.0  # wanted batch / gradient noise scale, both in target tokens
    controller.norm_test_theta = 0.5  # the largest noise / gradient with which norm_test is content

    c.stability = stability = ConfigDict()
    stability.on_spike = "warn"  # when loss or gradient spikes: none | warn | skip | rewind (to a checkpoint)
    stability.threshold = 6.0  # standard deviations above the running level from which on a value is a spike
    stability.half_life = 200_000  # tokens after which a value counts half in the running level
    stability.warmup_updates = 50  # updates at the beginning in which nothing is a spike
    stability.max_skips = 20  # the run stops after this many skipped updates in a row

    c.evaluate = evaluate = ConfigDict()
    evaluate.every = 100  # updates between evaluations on the held-out documents; 0 = only at the end
    evaluate.batch_size = 0  # sequences per call; 0 = the micro-batch size
    evaluate.probes = ()  # of long context, after the last update: position, context, passkey, needle, copy
    evaluate.answer_prefix = " "  # with --questions, between a question and each of its answers
    evaluate.read_bos = True  # with --questions, texts begin with bos; some models of others read none
    evaluate.probe_lengths = ()  # tokens of probe texts, also above seq_len; () = 1, 16, 32, 64, ... seq_len

    c.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 100  # updates between checkpoints; 0 = only at the end
    checkpoint.keep = 2  # newest checkpoints to keep; the newest known to give a finite loss stays as well
    checkpoint.keep_best = True  # keeps the checkpoint with the lowest held-out loss as well
    checkpoint.init_from = ""  # workdir, Hugging Face folder or GGUF file with the parameters to begin with
    checkpoint.init_checkpoint = "latest"  # latest | best | number of an update | average:3 of the newest 3

    # Where a run shows its metrics, besides its workdir.
    c.metrics = metrics = ConfigDict()
    metrics.wandb = ""  # "" = nowhere | online: Weights & Biases | offline: files for it, without a network
    metrics.wandb_project = "llmjax"  # the project there

    c.generate = generate = ConfigDict()
    generate.max_tokens = 200  # the most new tokens per prompt
    generate.temperature = 0.8  # 0 = always the likeliest token
    generate.top_k = 0  # samples among this many likeliest tokens; 0 = off
    generate.top_p = 0.95  # samples among the likeliest tokens that have this probability together; 1 = off
    generate.seed = 0  # decides the sampling
    generate.num_samples = 1  # texts per prompt, in mode generate
    generate.num_beams = 1  # texts side by side in beam search, the likeliest as a whole; 1 = samples
    generate.min_p = 0.0  # samples only tokens with this share of the largest probability or more; 0 = off
    generate.repetition_penalty = 1.0  # divides the logits of tokens that are there already; 1 = off
    generate.stop = ()  # strings that end a text, and are not written
    generate.slots = 0  # in mode generate, texts side by side, where there are more; 0 = all at once
    generate.length_penalty = 1.0  # beam search divides log-probabilities by the length to this power

    # Vectors of texts, for mode embed.
    c.embed = embed = ConfigDict()
    embed.pool = "mean"  # what stands for a text: the mean of its tokens | last token | first token, for bert
    embed.normalize = False  # makes vectors of length 1
    embed.read_end = False  # also reads the token that ends a text, as BERT was trained to
    embed.neighbours = 10  # how many nearest neighbours --neighbours shows

    # The server of mode serve; see docs/serving.md. The environment variable LLMJAX_API_KEY asks clients for a key.
    c.serve = serve = ConfigDict()
    serve.host = "127.0.0.1"  # the address to listen at: this machine alone; 0.0.0.0 = all its networks
    serve.port = 8000  # 0 = a free one, which is printed
    serve.slots = 8  # texts that are written at the same time; each has a cache of its own
    serve.max_context = 0  # tokens of a prompt and its answer; 0 = data.seq_len
    serve.max_text_tokens = 4096  # the most new tokens that a request may ask for in a text
    serve.max_queue = 64  # texts that may wait for a slot; more are refused
    serve.max_body_bytes = 1_000_000  # the largest request
    serve.max_seconds = 600.0  # the longest that a request may take
    serve.shutdown_seconds = 10.0  # how long texts may go on after the server was told to stop

    c.plan = plan = ConfigDict()
    plan.topology = ""  # compile for this TPU (v5p:4x4x4; v5e:4x4*2 = two slices), not the devices at hand

    return c.lock()
