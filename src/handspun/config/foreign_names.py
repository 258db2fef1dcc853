# ruff: noqa: E501  (a table)
"""Names of other tools' options, from transformers and TRL to llama.cpp, vLLM and OpenAI.

Each entry has their names and a note: either `{option}` (the name here) or a sentence. If several entries have the same
name, the first one counts whose options the command has.
"""

_STEPS = (
    "{batch_size} is the number of rows per optimizer step, over all processes. {max_tokens} decides how they are split "
    "to fit in memory, which changes no result. So set {batch_size} to rows per device x devices x accumulation steps."
)
_PRECISION = (
    "Use {dtype}: bfloat16, float32, or auto, which picks the faster one. float16 is not supported, because it would "
    "need loss scaling."
)
_FOUR_BITS = (
    "4-bit weights are not supported: {base_weights} int8 with {lora} keeps the frozen weights in a quarter of "
    "float32's memory."
)
_NO_MODULES_TO_SAVE = "With {lora}, everything but the adapters is frozen."
_ANSWERS = "Only assistant messages are trained on. `handspun preview` shows them."
_COLUMNS = "Columns are recognized by name (docs/data.md has the list). Rename yours."
_TRUST = "Code that comes with a model or a data set is never run."
_STOPS = "All epochs are run, and checkpoint-best is the one with the lowest held-out loss."
_PROCESSES = "Start several processes with torchrun -m handspun train; {shard} splits the model across them."

FOREIGN_NAMES: tuple[tuple[str, str], ...] = (
    # training: what is trained
    ("model_name_or_path base_model model_name model_id model_path pretrained_model_name_or_path ckpt", "{model}"),
    ("checkpoint checkpoint_path hf_path m", "{model}"),
    ("adapter_name_or_path adapter_path lora_path lora_model", "{model} takes an adapter's folder too."),
    ("dataset datasets dataset_name dataset_path data_path data_file data_files train_data", "{data}"),
    ("train_file train_path train_dataset training_data training_file train_files", "{data}"),
    ("validation_file eval_file eval_dataset valid_data val_data validation_data valid_file", "{eval_data}"),
    ("val_file val_dataset eval_path test_data test_file valid", "{eval_data}"),
    ("val_size val_set_size validation_split validation_split_percentage test_size val_split", "{eval_ratio}"),
    ("eval_split eval_size validation_ratio val_ratio test_split", "{eval_ratio}"),
    ("dataset_format data_type prompt_format dataset_type formatting", "{data_format}"),
    ("system system_message default_system sys_prompt", "{system_prompt}"),
    ("max_seq_length max_seq_len cutoff_len sequence_len seq_length seq_len", "{max_length}"),
    ("model_max_length block_size max_sequence_length max_prompt_length", "{max_length}"),
    ("output out out_dir save_dir output_path save_path outfile export_dir o", "{output_dir}"),
    ("overwrite_output_dir overwrite_output force f", "{overwrite}"),
    # training: steps
    ("lr peak_lr max_lr base_lr learningrate", "{learning_rate}"),
    ("num_train_epochs epochs n_epochs epoch max_epochs num_epoch train_epochs", "{num_epochs}"),
    ("total_steps max_train_steps iters num_iterations max_iters num_train_steps", "{max_steps}"),
    ("steps_per_epoch", "A step is {batch_size} rows, and `handspun preflight` shows the number of steps."),
    ("per_device_train_batch_size per_device_batch_size train_batch_size micro_batch_size mini_batch_size", _STEPS),
    ("micro_train_batch_size global_batch_size total_batch_size per_gpu_train_batch_size b bs", _STEPS),
    ("gradient_accumulation_steps gradient_accumulation grad_accum grad_accumulation_steps", _STEPS),
    ("accumulate_grad_batches accumulation_steps", _STEPS),
    (
        "per_device_eval_batch_size eval_batch_size",
        "Held-out rows are evaluated in micro-batches of {max_tokens} tokens.",
    ),
    ("warmup", "{warmup_ratio}"),
    (
        "warmup_steps num_warmup_steps lr_warmup_steps warmup_iters",
        "{warmup_ratio} is a share of all steps: use warm-up steps / steps. `handspun preflight` shows the number of "
        "steps.",
    ),
    ("lr_scheduler_type lr_scheduler scheduler lr_scheduler_name schedule lr_decay_style", "{lr_schedule}"),
    ("optim optimizer optimizer_type optimizer_name", "The optimizer is AdamW; {optimizer_states} sets the precision of its states."),
    ("adam_beta1 adam_beta2 adam_epsilon beta1 beta2 betas eps", "AdamW uses betas 0.9 and 0.999, and eps 1e-8."),
    ("wd adam_weight_decay", "{weight_decay}"),
    ("clip_grad_norm gradient_clipping gradient_clip_val grad_clip max_norm clip_grad", "{max_grad_norm}"),
    (
        "packing pack sample_packing neat_packing multipack_sampler pack_sequences",
        "{batching} packed is the default: rows are laid end to end without padding, and do not see each other.",
    ),
    ("group_by_length length_column_name", "With {batching} packed, nothing is padded."),
    ("shuffle shuffle_seed data_seed random_seed rng_seed", "Rows are shuffled in every epoch, with {seed}."),
    ("fp16 bf16 tf32 half mixed_precision precision amp torch_dtype fp16_full_eval bf16_full_eval", _PRECISION),
    ("use_bf16 use_fp16 pure_bf16 compute_dtype bnb_4bit_compute_dtype", _PRECISION),
    ("gradient_checkpointing use_gradient_checkpointing checkpoint_activations", "{activation_checkpointing}"),
    ("activation_recompute enable_activation_checkpointing", "{activation_checkpointing}"),
    # training: adapters
    ("use_lora peft use_peft lora_enable enable_lora", "{lora}"),
    ("adapter finetuning_type peft_type tuner train_type tuner_type", "{lora} trains LoRA adapters; without it, all weights are trained."),
    ("qlora use_qlora load_in_4bit quantization_bit quantization bits bnb_4bit_quant_type", _FOUR_BITS),
    ("load_in_8bit", "Use {base_weights} int8 with {lora}."),
    ("lora_r r rank lora_dim", "{lora_rank}"),
    ("alpha", "{lora_alpha}"),
    ("dropout lora_drop", "{lora_dropout}"),
    ("target_modules lora_target lora_modules lora_target_linear lora_keys", "{lora_target_modules}"),
    ("modules_to_save lora_modules_to_save freeze_layers", _NO_MODULES_TO_SAVE),
    ("use_rslora use_dora lora_bias bias init_lora_weights", "Adapters are plain LoRA, scaled by alpha / rank."),
    ("neftune_noise_alpha label_smoothing label_smoothing_factor", "The loss is plain cross-entropy."),
    ("train_on_inputs train_on_prompt train_on_source mask_prompt completion_only_loss", _ANSWERS),
    ("roles role_mapping roles_map role_tags user_tag assistant_tag", "{role_map} maps them, as in {role_map} agent=assistant."),
    ("assistant_only_loss train_on_responses_only mask_history roles_to_train", _ANSWERS),
    ("dataset_text_field text_column prompt_column response_column input_key output_key", _COLUMNS),
    ("prompt_field text_field columns field_messages messages_key", _COLUMNS),
    ("stage do_train do_eval", "Remove it: `handspun train` trains and evaluates."),
    ("max_samples max_train_samples num_samples max_rows", "{limit}"),
    ("max_eval_samples", "Shorten the file of held-out rows instead."),
    ("streaming", "Rows are read once and kept tokenized."),
    # training: evaluation, saving, logs
    ("eval_every val_check_interval steps_per_eval validation_steps eval_interval evaluation_steps", "{eval_steps}"),
    (
        "eval_strategy evaluation_strategy evals_per_epoch",
        "Held-out rows are evaluated at the start and at the end of every epoch; {eval_steps} adds more.",
    ),
    ("save_every checkpoint_every save_interval checkpoint_interval save_freq ckpt_every", "{save_steps}"),
    (
        "save_strategy saves_per_epoch",
        "Every epoch is saved; {save_steps} and {save_minutes} add checkpoints to resume from.",
    ),
    ("save_total_limit keep_checkpoint_max max_checkpoints checkpoint_limit", "{keep_last}"),
    ("logging_steps log_every log_interval logging_strategy", "Every step is in metrics.jsonl."),
    ("report_to logger loggers tracker", "{log_to}"),
    ("wandb_project use_wandb wandb_run_name run_name project", "Use {log_to} wandb, with the tracker's own environment variables."),
    ("resume_from_checkpoint resume_from auto_resume_from_checkpoints resume_from_path", "{resume}"),
    ("load_best_model_at_end metric_for_best_model greater_is_better", _STOPS),
    ("early_stopping_patience patience", _STOPS),
    ("push_to_hub hub_model_id repo_id hf_repo", "{push}"),
    ("push_to_hub hub_model_id repo_id hf_repo", "Use handspun export --push your-name/model-name to upload a finished model."),
    ("hub_token hf_token use_auth_token", "{token}"),
    # training: machines
    ("deepspeed fsdp zero_stage ds_config fsdp_config", _PROCESSES),
    ("nproc_per_node num_gpus n_gpus num_processes local_rank world_size", _PROCESSES),
    ("cpu use_cpu no_cuda gpu gpus", "{device}"),
    ("num_threads n_threads cpu_threads", "{threads}"),
    (
        "dataloader_num_workers num_workers num_proc dataset_num_proc preprocessing_num_workers",
        "Rows are tokenized once, on all cores, and stay in memory.",
    ),
    (
        "flash_attn attn_implementation use_flash_attention_2 flash_attention use_flash_attn xformers",
        "The attention implementation is chosen to fit the rows and the machine.",
    ),
    ("trust_remote_code", _TRUST),
    # decoding
    ("max_tokens n_predict num_predict max_gen_len max_completion_tokens max_output_tokens", "{max_new_tokens}"),
    ("max_length max_gen_toks max_tokens_to_sample predict", "{max_new_tokens}"),
    ("min_tokens min_length", "{min_new_tokens}"),
    ("temp t", "{temperature}"),
    ("topk k", "{top_k}"),
    ("topp nucleus", "{top_p}"),
    ("minp", "{min_p}"),
    ("typical typ_p", "{typical_p}"),
    ("repeat_penalty rep_pen repetition rep_penalty", "{repetition_penalty}"),
    ("repeat_last_n", "{repetition_penalty} covers the whole prompt and answer."),
    ("no_repeat_ngram no_repeat_ngrams", "{no_repeat_ngram_size}"),
    ("stop stop_sequences stop_words stops stop_string reverse_prompt antiprompt", "{stop_strings}"),
    ("stop_token_ids eos_token_id eos_token_ids ignore_eos", "The model defines its eos. {stop_strings} may contain a special token's text."),
    ("random_seed rng_seed s", "{seed}"),
    ("beam_size beams beam_width n_beams use_beam_search", "{num_beams}"),
    ("n num_return num_generations best_of num_completions", "{num_return_sequences}"),
    ("sample sampling", "{do_sample}"),
    ("greedy", "Greedy decoding is the default: remove {do_sample}."),
    ("guided_json response_format schema json_object guided_schema", "{json_schema}"),
    ("guided_regex pattern", "{regex}"),
    ("guided_choice choices", "{choice}"),
    ("grammar guided_grammar gbnf grammar_file", "Use {json_schema}, {regex} or {choice} to constrain answers."),
    ("banned_words banned_strings bad_words_list", "{bad_words}"),
    ("suppress banned_tokens suppressed_tokens", "{suppress_tokens}"),
    ("assistant_model draft_model speculative_model num_speculative_tokens", "Draft models are not supported: {prompt_lookup_num_tokens} takes draft tokens from the prompt."),
    ("mirostat mirostat_tau dynatemp_range xtc_threshold tfs_z top_a penalty_alpha epsilon_cutoff eta_cutoff",
     "Use {top_k}, {top_p}, {min_p} or {typical_p} to control sampling."),
    ("num_beam_groups diversity_penalty", "{num_beams} searches without groups."),
    ("ctx_size n_ctx num_ctx max_model_len context_length", "The model's own context length applies."),
    ("prompt_file input_file prompts file f", "{prompts_file}"),
    ("prompt", "{sample_prompts}"),
    ("prompt p input message", "Write the prompt itself, without an option name before it."),
    ("raw no_chat_template plain_text", "Use --no-chat to take prompts as they are."),
    ("output output_file o", "Answers go to standard output, as in > answers.txt."),
    ("output_format format", "{json}"),
    ("top_logprobs", "{explain} shows the runner-up of each token, and {logprobs} the log-probabilities."),
    ("stream", "`handspun chat` and handspun.stream show an answer while it is generated."),
    ("dtype torch_dtype precision fp16 bf16 half load_in_8bit quantization bits", "{weights}"),
    ("load_in_4bit", "4-bit weights are not supported: {weights} int8 takes a third of float32's memory."),
    ("n_gpu_layers ngl gpu_layers device_map", "{device}"),
    ("tensor_parallel_size tp gpu_memory_utilization", "A model is decoded on one device."),
    ("num_threads n_threads t", "{threads}"),
    ("max_num_seqs n_parallel n_batch", "{batch_size}"),
    # export
    ("merge_lora merge_adapter merge_and_unload", "{merge}"),
    ("outtype quantize quant q quantization gguf_type", "{gguf}"),
    ("dtype torch_dtype", "{save_dtype}"),
    ("template conversation_template chat_format chat_template_file chat_template_path", "{chat_template} takes a Jinja file or the name of one of the tokenizer's templates; the default is the tokenizer's own."),
    ("template conversation_template chat_format chat_template_file chat_template_path", "The chat template is the one of the model's tokenizer."),
    ("chat_template_kwargs default_chat_template_kwargs enable_thinking thinking no_think think reasoning_effort reasoning", "{template_args} sets the template's variables, such as enable_thinking=false."),
    ("chat_template_kwargs default_chat_template_kwargs enable_thinking thinking no_think think reasoning_effort reasoning", "Set the chat template's variables by name, as in template_args=dict(enable_thinking=False)."),
)  # fmt: skip
