"""What is read from the text of a compiled program: how often an instruction runs, and what it moves."""

from ldm_jax.foresee import collectives, text

LOOPED = """
HloModule jit_step, is_scheduled=true

%fused.1 (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %sum = f32[8,128]{1,0:T(8,128)} add(%a, %a)
}

%body (c: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %c = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%c), index=1
  %y = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused.1
  %z = f32[8,128]{1,0:T(8,128)} all-reduce(%y), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %z)
}

ENTRY %main.5 (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %copy-start.1 = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done.1 = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[8,128]{1,0:T(8,128)}), f32[4,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p)
  %slice-done.1 = f32[4,128]{1,0:T(8,128)S(1)} slice-done(%slice-start.1)
  %whole = f32[8,128]{1,0:T(8,128)} custom-call(%slice-done.1, %p), custom_call_target="ConcatBitcast", config={
}}, metadata={op_name="which goes over two lines"}
  %f.2 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%copy-done.1, %p), kind=kLoop, calls=%fused.1
  %w = (s32[], f32[8,128]{1,0}) while(%t.1), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""
ARRAY = 8 * 128 * 4


def test_instructions_run_as_often_as_their_loops_turn():
    times = {one.name: n for one, n, _ in text.running(LOOPED)}
    assert times["f.2"] == 1
    assert times["y"] == times["z"] == 5
    assert "sum" not in times  # of a fusion, which is one instruction
    assert text.computations(LOOPED)[1] == "main.5"
    assert next(one for one, _, _ in text.running(LOOPED) if one.name == "f.2").operands == [
        "copy-done.1",
        "p",
    ]


def test_what_lies_in_the_chip_is_no_traffic():
    # p is copied, half of it again, and f.2 reads it and writes half as much; in each turn x is read, and z written.
    assert text.traffic(LOOPED) == ARRAY + ARRAY // 2 + (ARRAY + ARRAY // 2) + 5 * (ARRAY + ARRAY)


def test_a_collective_within_a_loop_counts_in_each_turn():
    assert collectives.read(LOOPED) == [collectives.Collective("all-reduce", ARRAY)] * 5
