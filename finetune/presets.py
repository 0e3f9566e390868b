"""Named fine-tuning runs. A preset is a function; its docstring says what it is, how to run it and what it reached."""

from __future__ import annotations

from finetune.glue import record as glue
from finetune.tasks.answer import record as answer
from finetune.tasks.choose import record as choose
from finetune.tasks.classify import record as classify
from finetune.tasks.concepts import record as concepts
from finetune.tasks.embed import record as embed
from finetune.tasks.instruct import record as instruct
from finetune.tasks.prefer import record as prefer
from finetune.tasks.rank import record as rank
from finetune.tasks.rationale import record as rationale
from finetune.tasks.reinforce import record as reinforce
from finetune.tasks.reward import record as reward
from finetune.tasks.rewrite import record as rewrite
from finetune.tasks.tag import record as tag

PRESETS = {
    "classify": classify.classify,
    "classify-debug": classify.classify_debug,
    "demo": classify.demo,
    "rationale": rationale.rationale,
    "concepts": concepts.concepts,
    "glue": glue.glue,
    "tag": tag.tag,
    "embed": embed.embed,
    "answer": answer.answer,
    "rank": rank.rank,
    "reward": reward.reward,
    "prefer": prefer.prefer,
    "instruct": instruct.instruct,
    "translate": instruct.translate,
    "rewrite": rewrite.rewrite,
    "reinforce": reinforce.reinforce,
    "choose": choose.choose,
}
