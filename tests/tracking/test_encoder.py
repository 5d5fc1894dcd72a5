"""Several images through one model: what may be kept, put around, hidden, asked for; and who runs it."""
import pytest
import torch
from support.onnx_runtime import load_onnx
from support.small import images, small_model

import timm_itpn
from timm_itpn.tracking import JointEncoder

ROLES = dict(search=64, template=(32, 48))
TINY = dict(embed_dim=64, depths=(1, 1, 3))
pytestmark = pytest.mark.usefixtures('one_thread')


def encoder_of(name='fast_itpn_tiny', roles=ROLES, positions='crop', migrate=None, names=None, **kwargs):
    kwargs = {**TINY, **({} if name.startswith('fast') else dict(rel_pos_bias=False)), **kwargs}
    model = small_model(name, **kwargs)
    for block in model.stages[2].blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)
        torch.nn.init.normal_(block.attn.proj.weight, std=0.2)
    return JointEncoder(model, roles, positions, migrate, names=names).eval()


def inputs(num=3):
    return dict(search=images(2, 3, 64, 64), template=images(2, num, 3, 32, 48))


def assert_close(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize('name', ['fast_itpn_tiny', 'hivit_tiny'])
@torch.no_grad()
def test_images_are_encoded_alone_before_stage_3_and_together_in_it(name):
    encoder, x = encoder_of(name), inputs()
    before, after, types = images(1, 2, 64), images(2, 1, 64), dict(search=images(64), template=images(2, 3, 6, 64))
    tokens, maps = encoder(x, before, after, types)
    assert tokens.shape == (2, 2 + 16 + 3 * 6 + 1, 64)
    assert maps['search'].shape == (2, 64, 4, 4) and maps['template'].shape == (2, 3, 64, 2, 3)
    assert torch.equal(maps['search'].flatten(2).mT, tokens[:, 2:18])
    assert torch.equal(maps['template'].permute(0, 1, 3, 4, 2).flatten(1, 3), tokens[:, 18:-1])
    one = encoder.embed(x['template'][:, 1], 'template', types['template'][:, 1])
    kept = encoder.embed(x['template'], 'template', types['template'])
    assert_close(kept[:, 1], one)
    assert_close(encoder(dict(x, template=kept), before, after, dict(search=types['search']))[0], tokens)
    other = x['template'].clone()
    other[:, 2] = 0.
    assert (encoder(dict(x, template=other), before, after, types)[1]['search'] - maps['search']).abs().max() > 1e-3
    swapped, _ = encoder(dict(template=x['template'], search=x['search']), before, after, types)
    assert_close(swapped[:, 20:36], maps['search'].flatten(2).mT)  # where a token is in the sequence says nothing
    shared, maps = encoder(dict(x, template=x['template'][:1]), before, after)  # templates of all samples
    repeated, wanted = encoder(dict(x, template=x['template'][:1].expand(2, -1, -1, -1, -1)), before, after)
    assert_close(shared, repeated)
    assert_close(maps['template'], wanted['template'])
    alone, _ = encoder(dict(search=x['search']))
    assert_close(alone, encoder.norm(encoder.run(encoder.embed(x['search'], 'search'))))


@torch.no_grad()
def test_mask_hides_images_from_each_other():
    encoder, x = encoder_of(), inputs()
    sees = torch.ones(34, 34, dtype=torch.bool)
    sees[:16, 16:] = False
    _, maps = encoder(x, bias=sees)
    assert_close(maps['search'], encoder(dict(search=x['search']))[1]['search'])
    parts = {role: encoder.embed(images, role) for role, images in x.items()}
    weights = encoder.attention(encoder.join(parts), 0, sees)
    assert weights[:, :, :16, 16:].max() == 0. and weights[:, :, 16:, :16].min() > 0.


@torch.no_grad()
def test_attention_is_what_the_blocks_weigh_with():
    encoder, x = encoder_of(attn_impl='reference'), inputs()
    fused, seen = timm_itpn.fuse(encoder), []
    tokens = encoder.join({role: encoder.embed(images, role) for role, images in x.items()})
    encoder.stages[2].blocks[0].attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    encoder.run(tokens, 0, 1)
    assert_close(encoder.attention(tokens, 0), seen[0])
    assert_close(fused.attention(tokens, 0), seen[0])
    assert_close(fused(x)[0], encoder(x)[0], atol=1e-4)


@pytest.mark.parametrize('migrate', [None, {0: 4, 1: 0.2}])
def test_gradients_are_the_same_with_checkpointing_and_reach_all_parameters(migrate):
    encoder, gradients = encoder_of(migrate=migrate).train(), []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        assert [stage.grad_checkpointing for stage in encoder.stages] == 3 * [enable]
        encoder(inputs())[0].square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
        encoder.zero_grad()
    assert set(gradients[0]) == set(encoder.state_dict())
    assert encoder.no_weight_decay() == {'pos_embed.search', 'pos_embed.template'}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_blocks_may_be_looked_between():
    encoder, x = encoder_of(), inputs()
    tokens = encoder.join({role: encoder.embed(images, role) for role, images in x.items()})
    for block in range(3):
        tokens = encoder.run(tokens, block, block + 1)
    assert_close(encoder.norm(tokens), encoder(x)[0])


@torch.no_grad()
def test_no_template_is_a_sequence_without_any():
    encoder, x = encoder_of(), inputs()
    tokens, maps = encoder(dict(x, template=x['template'][:, :0]))
    assert maps['template'].shape == (2, 0, 64, 2, 3)
    assert_close(tokens, encoder(dict(search=x['search']))[0])


@torch.no_grad()
def test_kept_tokens_and_images_are_told_apart():
    encoder = encoder_of(roles=dict(search=(32, 256), template=64), embed_dim=256)  # tokens of search are (32, 256) too
    x = dict(search=images(2, 3, 32, 256))
    kept = dict(search=encoder.embed(x['search'], 'search'))
    assert_close(encoder(kept)[0], encoder(x)[0])
    with pytest.raises(ValueError, match=r"'template' takes images \(3, 64, 64\).* not \(2, 1, 3, 16, 256\)"):
        encoder(dict(template=images(2, 1, 3, 16, 256)))  # the last sides are those of tokens


@torch.no_grad()
def test_joined_tokens_have_the_type_of_the_encoder():
    encoder, x = encoder_of(), inputs()
    expected = encoder(x)[0]
    kept = {role: encoder.embed(images, role) for role, images in x.items()}
    assert_close(encoder({role: tokens.double() for role, tokens in kept.items()})[0], expected)
    assert_close(encoder(dict(x, template=kept['template'].half()))[0], expected, atol=1e-2)
    assert encoder.bfloat16().join(kept, before=torch.zeros(1, 1, 64)).dtype == torch.bfloat16


@torch.no_grad()
def test_attention_is_float32_under_autocast():
    encoder, x = encoder_of(), inputs()
    tokens = encoder.join({role: encoder.embed(images, role) for role, images in x.items()})
    expected = encoder.attention(tokens, 2)
    assert torch.equal(encoder.attention(tokens, -1), expected)
    with torch.autocast('cpu', torch.bfloat16):
        found = encoder.attention(tokens, 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 34))  # with 8 bits it is 4e-3 beside that
    assert (found - expected).abs().max() < 0.1


@pytest.mark.parametrize('shape', [
    (1, 64), (3, 1, 64), (2, 3, 6, 1), (6, 1), (1,), (), (2, 6, 64), (3, 6, 64), (1, 2, 6, 64), (3, 3, 6, 64), (2, 64)])
def test_types_of_other_shapes_are_refused(shape):
    encoder, x = encoder_of(), inputs()
    for given in (x, {role: encoder.embed(value, role) for role, value in x.items()}):
        with pytest.raises(ValueError, match='types .* do not fit tokens .2, 3, 6, 64.: use'):
            encoder(given, types=dict(template=torch.zeros(shape)))
    with pytest.raises(ValueError, match='do not fit tokens'):
        encoder.embed(x['template'], 'template', torch.zeros(shape))


@torch.no_grad()
def test_types_are_of_a_token_of_an_image_or_of_all():
    encoder, x = encoder_of(), inputs()
    tokens = encoder.embed(x['template'], 'template')
    for shape in ((64,), (6, 64), (2, 3, 6, 64), (1, 3, 6, 64), (2, 1, 6, 64), (1, 1, 6, 64)):
        types = images(*shape)
        assert torch.equal(encoder.embed(x['template'], 'template', types), tokens + types)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda e: e(dict(seach=images(2, 3, 64, 64))), "role 'seach' is unknown: the encoder is for search, template"),
    (lambda e: e(inputs(), types=dict(seach=images(64))), "types are given for 'seach', but the inputs are: search, "),
    (lambda e: e.split(images(2, 16, 64), dict(seach=images(2, 16, 64))), "role 'seach' is unknown"),
    (lambda e: e(dict(template=images(2, 3, 64, 64))), r"'template' takes images \(3, 32, 48\) .*not \(2, 3, 64, 64\)"),
    (lambda e: e.embed(images(3, 64, 64), 'search'), 'in batches'),
    (lambda e: e(dict(search=images(16, 64))), r"'search' takes images .* not \(16, 64\)"),
    (lambda e: e(dict(inputs(), template=images(3, 1, 3, 32, 48))), r'tokens \[\(2, 16, 64\), \(3, 6, 64\)\]: each'),
    (lambda e: e(inputs(), before=images(4, 64)), r'Cannot join tokens \[\(4, 64\), .* each must be \(B or 1, N, 64\)'),
    (lambda e: e(inputs(), after=images(64)), r'Cannot join tokens .*, \(64,\)\]'),
    (lambda e: e(inputs(), after=images(1, 1, 32)), r'Cannot join tokens .*, \(1, 1, 32\)\]'),
    (lambda e: e({}), r'Cannot join tokens \[\]'),
    (lambda e: e.run(images(2, 5, 64), 2, 4), 'no blocks 2 to 4: stage 3 has 3'),
    (lambda e: e.run(images(2, 5, 64), -1), 'no blocks -1 to None: stage 3 has 3'),
    (lambda e: e.attention(images(2, 5, 64), 7), 'no blocks 7 to 8: stage 3 has 3'),
    (lambda e: e.attention(images(2, 5, 64), -4), 'no blocks -1 to 0: stage 3 has 3'),
    *[(lambda e, roles=roles: encoder_of(roles=roles), r'roles \[.*\] cannot be: give names without dots, none that')
      for roles in ({}, {'': 64}, {'a.b': 64}, {'search': 64, 'keys': 32}, {'training': 64})],
    *[(lambda e, names=names: encoder_of(names=names), r'names .* cannot be: its keys are')
      for names in ({'pos_embed.serch': 'x'}, {'norm_': 'norm'}, {'cls_token': 'x'})],
    (lambda e: encoder_of(roles=dict(search=100)), 'both sides must be multiples of 16'),
    (lambda e: encoder_of(migrate={0: 0.4, 1: 0.4}), 'migrate lets 6 tokens leave at block 1'),
    (lambda e: encoder_of(migrate={0: 4})(inputs(), bias=torch.zeros(34, 34)), "one image of the role 'search' is ne"),
    (lambda e: encoder_of(positions='nearest'), "positions 'nearest' is unknown"),
    (lambda e: encoder_of(acceleration='full'), 'no grid: create the model with .* without acceleration'),
    (lambda e: JointEncoder(small_model('itpn_tiny', **TINY), ROLES), 'no grid: .* with rel_pos_bias=False'),
])
def test_mistakes_are_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        change(encoder_of())


class Frame(torch.nn.Module):
    """What a tracker runs for each frame, with one input per tensor."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, search, template):
        return self.encoder(dict(search=search, template=template))[1]['search']


def test_one_exported_program_takes_any_number_of_kept_templates(tmp_path):
    encoder, path = encoder_of(exportable=True, depths=(1, 1, 1)), str(tmp_path / 'frame.onnx')
    kept, search = encoder.embed(inputs()['template'], 'template').detach()[:1], images(1, 3, 64, 64)
    shapes = dict(search={}, template={1: torch.export.Dim('num', min=1, max=8)})
    torch.onnx.export(Frame(encoder).eval(), (search, kept), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    run = load_onnx(path)
    for num in (1, 2, 3):
        found, = run(search, kept[:, :num])
        assert_close(found, Frame(encoder)(search, kept[:, :num]).detach(), atol=1e-4)


@torch.no_grad()
def test_compiled_encoder_agrees():
    encoder, x = encoder_of(depths=(1, 1, 1)), inputs()
    compiled = torch.compile(timm_itpn.fuse(encoder), fullgraph=True, backend='aot_eager')
    assert_close(compiled(x)[1]['search'], encoder(x)[1]['search'], atol=1e-4)


@torch.no_grad()
def test_tokens_migrate_as_in_the_model():
    x, migrate = images(2, 3, 64, 64), {0: 0.25, 1: 3}
    encoder, plain = (encoder_of(roles=dict(search=64, template=32), migrate=m) for m in (migrate, None))
    model = small_model('fast_itpn_tiny', **TINY, migrate=migrate)
    weights = {key: value for key, value in encoder.state_dict().items() if key in model.state_dict()}
    model.load_state_dict({**model.state_dict(), **weights, 'stages.2.pos_embed': encoder.pos_embed['search']})
    expected = encoder.norm(model.forward_features(x)).permute(0, 3, 1, 2)
    assert_close(encoder(dict(search=x))[1]['search'], expected)
    assert (plain(dict(search=x))[1]['search'] - expected).abs().max() > 1e-3
    template, before = images(2, 2, 3, 32, 32), images(1, 1, 64)
    tokens, maps = encoder(dict(search=x, template=template), before)
    behind, others = encoder(dict(template=template, search=x), before)
    assert_close(others['search'], maps['search'])
    assert_close(torch.cat((behind[:, :1], behind[:, 9:], behind[:, 1:9]), dim=1), tokens)
    assert_close(timm_itpn.fuse(encoder)(dict(search=x, template=template), before)[0], tokens, atol=1e-4)
