"""The decoder of docs/science.md once more, in plain numpy loops: what model.py must equal."""

import numpy as np


def rms_norm(x, gamma, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gamma


def rotate(x_TK, base):
    """RoPE, rotate-half layout, one head: pair (i, i + K/2) of row t turns by t * base^(-2i/K)."""
    T, K = x_TK.shape
    out = np.empty_like(x_TK)
    for t in range(T):
        for i in range(K // 2):
            angle = t * base ** (-2 * i / K)
            a, b = x_TK[t, i], x_TK[t, i + K // 2]
            out[t, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, i + K // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits(params, tokens_T, config):
    """[T, V] logits of one sequence, and the post-RoPE keys [layers, T, kv_heads, head_dim]."""
    return _decoder(params, tokens_T, config)[:2]


def largest_logits(params, tokens_T, config):
    """[layers, heads]: the largest causal attention logit of one sequence."""
    return _decoder(params, tokens_T, config)[2]


def _decoder(params, tokens_T, config):
    x = params["embedding"][tokens_T] * np.sqrt(config.d_model)
    keys, largest = [], []
    for layer in range(config.num_layers):
        block = {name: _layer(tree, layer) for name, tree in params["blocks"].items()}
        attended, key, top = _attention(
            block["attention"],
            rms_norm(x, block["attention_norm"]["gamma"], config.norm_eps),
            config,
        )
        keys.append(key)
        largest.append(top)
        x = x + attended
        x = x + _mlp(block["mlp"], rms_norm(x, block["mlp_norm"]["gamma"], config.norm_eps), config)
    x = rms_norm(x, params["final_norm"]["gamma"], config.norm_eps)
    return x @ params["embedding"].T, np.stack(keys), np.stack(largest)


def _layer(tree, layer):
    if isinstance(tree, dict):
        return {name: _layer(child, layer) for name, child in tree.items()}
    return tree[layer]


def _attention(p, x_TD, config):
    T, K = len(x_TD), config.head_dim
    q = (x_TD @ p["query"]["kernel"]).reshape(T, config.num_heads, K)
    k = (x_TD @ p["key"]["kernel"]).reshape(T, config.num_kv_heads, K)
    v = (x_TD @ p["value"]["kernel"]).reshape(T, config.num_kv_heads, K)
    if config.qk_norm != "none":
        q = rms_norm(q, p["query_norm"]["gamma"], config.norm_eps)
        k = rms_norm(k, p["key_norm"]["gamma"], config.norm_eps)
    k = np.stack([rotate(k[:, g], config.rope_base) for g in range(config.num_kv_heads)], axis=1)
    heads, largest = [], []
    for h in range(config.num_heads):
        shared = h // (config.num_heads // config.num_kv_heads)
        scores = rotate(q[:, h], config.rope_base) @ k[:, shared].T / np.sqrt(K)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        largest.append(scores.max())
        heads.append(softmax(scores) @ v[:, shared])
    return np.concatenate(heads, axis=-1) @ p["output"]["kernel"], k, np.array(largest)


def _mlp(p, x_TD, config):
    up = x_TD @ p["up"]["kernel"]
    if config.mlp == "swiglu":
        gate = x_TD @ p["gate"]["kernel"]
        hidden = gate / (1 + np.exp(-gate)) * up
    else:
        hidden = np.maximum(up, 0) ** 2
    return hidden @ p["down"]["kernel"]
