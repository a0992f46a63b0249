"Names of the official releases, translated to those of this project, for the parity tests."

import torch


def semanticmim(state):
    """SemanticMIM's backbone (mmpretrain names) -> (encoder state, reconstruction blocks' state, mask
    token). Works for weights and gradients."""
    encoder, blocks = {}, {}
    prefix = state['cls_token'].shape[1]
    encoder['cls_token'] = state['cls_token'][:, :1]
    if prefix > 1:
        encoder['reg_token'] = state['cls_token'][:, 1:]
    encoder['pos_embed'] = state['pos_embed']
    for name in ('weight', 'bias'):
        encoder[f'patch_embed.proj.{name}'] = state[f'patch_embed.projection.{name}']
        encoder[f'norm.{name}'] = state[f'ln1.{name}']
    for stack, out, cross in (('layers', encoder, False), ('extra_layers', blocks, True)):
        depth = 1 + max((int(k.split('.')[1]) for k in state if k.startswith(stack + '.')), default=-1)
        for i in range(depth):
            s = {
                k.removeprefix(f'{stack}.{i}.'): v for k, v in state.items() if k.startswith(f'{stack}.{i}.')
            }
            p = f'{i}.' if cross else f'blocks.{i}.'
            for ours, theirs in (
                ('norm1', 'ln1'),
                ('norm2', 'ln2'),
                ('attn.proj', 'attn.proj'),
                ('mlp.fc1', 'ffn.layers.0.0'),
                ('mlp.fc2', 'ffn.layers.1'),
            ):
                for name in ('weight', 'bias'):
                    out[f'{p}{ours}.{name}'] = s[f'{theirs}.{name}']
            if 'gamma_1' in s:
                out[f'{p}ls1.gamma'], out[f'{p}ls2.gamma'] = s['gamma_1'], s['gamma_2']
            kind = 'q_proj', 'kv_proj'
            if 'attn.q.weight' in s:
                kind, qb, kvb = ('q', 'kv'), s['attn.q.bias'], s['attn.kv.bias']
            else:
                qb, kvb = s['attn.q_bias'], torch.cat([torch.zeros_like(s['attn.v_bias']), s['attn.v_bias']])
            qw, kvw = s[f'attn.{kind[0]}.weight'], s[f'attn.{kind[1]}.weight']
            if cross:
                (
                    out[f'{p}attn.q.weight'],
                    out[f'{p}attn.kv.weight'],
                    out[f'{p}attn.q.bias'],
                    out[f'{p}attn.kv.bias'],
                ) = qw, kvw, qb, kvb
            else:
                out[f'{p}attn.qkv.weight'], out[f'{p}attn.qkv.bias'] = (
                    torch.cat([qw, kvw]),
                    torch.cat([qb, kvb]),
                )
    return encoder, blocks, state['mask_token']
