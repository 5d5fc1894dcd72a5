"""What users write about acceleration, and what it means."""
import pytest

from timm_itpn.acceleration.schedule import ACCELERATIONS, Schedule, num_leaving, parse_schedule


@pytest.mark.parametrize('kwargs', [
    {}, dict(migrate={}), dict(gather_window=0), dict(gather_window=8, gather_blocks=[]), dict(migrate={2: 0}),
])
def test_nothing_to_do_is_no_schedule(kwargs):
    assert parse_schedule(4, **kwargs) is None


def test_parts_make_a_schedule():
    assert parse_schedule(3, gather_window=8) == Schedule(8, (True,) * 3, (0.,) * 3)
    assert parse_schedule(3, gather_window=8, gather_blocks=[0, -1]) == Schedule(8, (True, False, True), (0.,) * 3)
    assert parse_schedule(3, migrate={0: 0.25, 2: 7}) == Schedule(0, (True,) * 3, (0.25, 0., 7.))
    assert parse_schedule(3, migrate={'0': 0.25, '-1': 7}) == Schedule(0, (True,) * 3, (0.25, 0., 7.))  # as in JSON


@pytest.mark.parametrize('name', ACCELERATIONS)
@pytest.mark.parametrize('depth', [1, 2, 3, 10, 12, 20, 24, 40])
def test_named_settings_suit_every_depth(name, depth):
    schedule = parse_schedule(depth, acceleration=name)
    assert len(schedule.windowed) == len(schedule.migrate) == depth
    for smallest in (1, 4, 49, 144, 256):
        assert sum(num_leaving(schedule.migrate, smallest)) <= 0.6 * smallest


def test_named_settings_of_24_blocks():
    assert parse_schedule(24, acceleration='light') == Schedule(16, (True,) * 12 + (False,) * 12, (0.,) * 24)
    full = parse_schedule(24, acceleration='full')
    assert (full.gather_window, full.windowed) == (16, (True,) * 16 + (False,) * 8)
    assert {i: share for i, share in enumerate(full.migrate) if share} == {3: 0.2, 6: 0.2, 8: 0.2}


def test_parts_replace_those_of_a_named_setting():
    full = parse_schedule(12, acceleration='full')
    assert parse_schedule(12, acceleration='full', gather_window=7) == full._replace(gather_window=7)
    assert parse_schedule(12, acceleration='full', migrate={}) == full._replace(migrate=(0.,) * 12)
    assert parse_schedule(12, acceleration='full', carry=0) == full._replace(carry=False)
    assert parse_schedule(12, acceleration='full', gather_blocks=range(12)).windowed == (True,) * 12


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(acceleration='fast'), "acceleration 'fast' is unknown"),
    (dict(gather_window=-1), 'gather_window -1 is not usable'),
    (dict(gather_window=7.5), 'gather_window 7.5 is not usable'),
    (dict(gather_window=True), 'gather_window True is not usable'),
    (dict(gather_blocks=[0]), 'gather_blocks needs gather_window'),
    (dict(gather_window=7, gather_blocks=[4]), 'gather_blocks names block 4'),
    (dict(gather_window=7, gather_blocks=['x']), "gather_blocks names block 'x'"),
    (dict(gather_window=7, gather_blocks=3), 'gather_blocks 3 is not usable'),
    (dict(migrate={4: 0.5}), 'migrate names block 4'),
    (dict(migrate={0: 0.1, -4: 0.1}), 'migrate names block 0 twice'),
    (dict(migrate={0: 1.}), 'migrate asks for 1.0 at block 0'),
    (dict(migrate={0: -1}), 'migrate asks for -1 at block 0'),
    (dict(migrate={0: float('nan')}), 'migrate asks for nan at block 0'),
    (dict(migrate={0: '0.5'}), "migrate asks for '0.5' at block 0"),
    (dict(carry=0.5), 'carry 0.5 is not usable'),
    (dict(migrate=[0.5]), r'migrate \[0.5\] is not usable'),
])
def test_what_cannot_be_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        parse_schedule(4, **kwargs)


def test_shares_are_of_what_was_there_at_first():
    assert num_leaving([0., 0.25, 0., 0.25], 196) == [0, 49, 0, 49]
    assert num_leaving([10., 0., 0.5 / 3], 30) == [10, 0, 5]


def test_more_than_half_cannot_leave_at_once():
    assert num_leaving([8.], 16) == [8]
    with pytest.raises(ValueError, match='lets 9 tokens leave at block 0, but of the 16 in a window 16 are left'):
        num_leaving([9.], 16)
    with pytest.raises(ValueError, match='lets 5 tokens leave at block 1, but of the 16 in a window 8 are left'):
        num_leaving([8., 5.], 16)
