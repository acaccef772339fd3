#!/bin/bash
# BLUR around the methods of this repository, on TOFU. Run in the repository's root.
set -euo pipefail

########################################################################################################################
########################################### Set-up, once ##############################################################
########################################################################################################################

# pip install 'torch>=2.10' 'transformers==4.57.6'
# pip install path/to/blur_optim
# cp -r path/to/blur_optim/examples/open_unlearning/. .
# echo 'import blur_optim.integrations.open_unlearning  # noqa: E402,F401' >> src/trainer/__init__.py

# DeepSpeed's configuration in configs/accelerate was not tried with BLUR.
launch=${LAUNCH:-torchrun --nproc_per_node ${NUM_GPUS:-1}}
model=${MODEL:-Llama-3.2-1B-Instruct}
# flash_attention_2 where it was built for the newer torch
attention=${ATTENTION:-sdpa}
per_device_train_batch_size=4
gradient_accumulation_steps=4

run() { # METHOD EXPERIMENT RULE LR ALPHA FORGET HOLDOUT RETAIN
    local task=tofu_${model}_${6}_BLUR_${1}_${3}_lr${4}_alpha${5}

    ${launch} src/train.py --config-name=unlearn.yaml experiment=${2} \
        trainer=BLUR_${1} task_name=${task} model=${model} \
        forget_split=${6} retain_split=${8} \
        model.model_args.pretrained_model_name_or_path=open-unlearning/tofu_${model}_full \
        model.model_args.attn_implementation=${attention} \
        retain_logs_path=saves/eval/tofu_${model}_${8}/TOFU_EVAL.json \
        trainer.args.per_device_train_batch_size=${per_device_train_batch_size} \
        trainer.args.gradient_accumulation_steps=${gradient_accumulation_steps} \
        trainer.args.ddp_find_unused_parameters=true \
        trainer.args.gradient_checkpointing=true \
        trainer.args.eval_strategy=no trainer.args.eval_on_start=false \
        trainer.args.learning_rate=${4} \
        trainer.method_args.alpha=${5} \
        trainer.method_args.rule=${3}

    python src/eval.py --config-name=eval.yaml experiment=eval/tofu/default \
        forget_split=${6} holdout_split=${7} model=${model} task_name=${task} \
        model.model_args.pretrained_model_name_or_path=saves/unlearn/${task} \
        model.model_args.attn_implementation=${attention} \
        paths.output_dir=saves/unlearn/${task}/evals \
        retain_logs_path=saves/eval/tofu_${model}_${8}/TOFU_EVAL.json
}

########################################################################################################################
########################################### Hyper parameter tuning #####################################################
########################################################################################################################

# The weighted sum gets the same search: a difference is one of the step, not of the effort.
for split in "forget01 holdout01 retain99" "forget05 holdout05 retain95" "forget10 holdout10 retain90"; do
    for method in "NPO unlearn/tofu/default" "SimNPO unlearn/tofu/default" "DPO unlearn/tofu/idk"; do
        for rule in blur weighted_sum; do
            for lr in 5e-6 1e-5 2e-5; do
                for alpha in 1.0 2.0 5.0; do
                    run ${method} ${rule} ${lr} ${alpha} ${split}
                done
            done
        done
    done
done

########################################################################################################################
########################################### Final best parameters #####################################################
########################################################################################################################

# None yet: see README.md.
