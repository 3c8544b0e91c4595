"""Given to `swift sft --external_plugins`: the GFT loss, and a template that adds nothing to prompt and response."""

from swift.template import TemplateMeta, register_template

from gft_kernels.integrations.swift import register

register(tau=0.1)
register_template(TemplateMeta("bare", prefix=[], prompt=["{{QUERY}}"], chat_sep=None, suffix=[["eos_token_id"]]))
