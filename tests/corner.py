"""Which tests also run on the oldest and the newest versions (marker `corner`): those of what JAX, Flax, optax, orbax,
transformers, tyro, tensorboardX or Python itself do differently. None of these files imports PyTorch.

tests/conftest.py reads this table; `python tests/corner.py` prints the files, and .ci/run collects no others. A name
stands for all cases of a test, `name[case]` for one (`name[first …` too, where a case has blanks); a name that is no
longer there is an error.
"""

CORNER = {
    # JAX's distributed runtime, signals in its native code.
    "e2e/test_kill.py": "test_killed_and_terminated_runs_go_on_bit_by_bit",
    "multiprocess/test_ends.py": """test_a_signal_to_one_saves_in_all_at_the_same_step[SIGTERM]
        test_the_death_of_one_ends_the_other_soon_and_in_one_line[1]""",
    # What tyro prints is read and said anew.
    "test_cli.py": """test_flags_change_the_preset_and_nothing_else test_the_nearest_flags_are_flags_of_this_preset
        test_help_of_a_preset_lists_every_flag_with_its_meaning_and_value test_required_values_may_stand_first
        test_required_values_that_are_missing_or_too_many_are_named
        test_a_command_without_presets_takes_flags_and_names_what_is_missing""",
    "test_exits.py": "test_the_line_is_the_same_whatever_the_terminal_can_show",
    # Unicode's tables are Python's.
    "test_data_alphabet.py": """test_characters_are_normalised_as_unicode_says test_no_character_is_lost
        test_case_and_marks_are_kept_unless_asked_and_alike_in_transformers""",
    "test_data_words.py": "test_decomposed_characters_move_nothing",
    "test_library_log.py": """test_native_lines_go_to_the_log_and_those_of_python_to_the_terminal
        test_in_a_run_they_lie_in_its_directory test_what_jax_prints_for_the_user_passes""",
    "test_models_attention.py": """test_attention_equals_brute_force test_dropout_drops_its_share_and_keeps_the_mean
        test_what_a_backend_says_that_it_keeps_is_what_it_keeps""",
    "test_models_counts.py": "test_flops_equal_those_of_the_compiler",
    "test_models_families.py": """test_published_configurations_read_as_they_are_meant
        test_a_family_names_the_version_of_transformers_that_brought_it""",
    "test_models_gpu_attention.py": """test_kernel_equals_reference[causal] test_kernels_are_made_for_a_gpu[window-64-4]
        test_what_cudnn_is_asked_for_equals_reference""",
    "test_models_hub.py": """test_half_precision_is_read_exactly_and_written
        test_several_files_with_an_index test_weights_are_placed_on_the_mesh_piece_by_piece
        test_a_repository_comes_from_the_cache_of_the_hub""",
    "test_models_splash.py": "test_kernel_equals_reference test_kernel_on_a_mesh_equals_reference[causal-data=2",
    "test_models_transformer.py": """test_gradients_reach_exactly_the_tokens_that_may_be_seen
        test_scan_and_rematerialisation_change_nothing test_rematerialisation_recomputes_and_scan_scans
        test_meshes_change_nothing test_dropout_is_the_same_on_every_mesh_and_in_a_loop
        test_bfloat16_computes_in_bfloat16_and_differentiates_in_float32
        test_products_in_bfloat16_leave_the_rest_in_float32
        test_decoding_with_the_cache_equals_the_whole_sequence test_initial_parameters""",
    # Of Colab above all, whose kernel runs it.
    "test_notebooks.py": "test_a_notebook_runs[7] test_words_of_libraries_that_work_for_us_go_to_a_log",
    "test_models_vocabulary.py": """test_chunks_equal_a_plain_log_softmax_in_value_and_gradient[4-True-float32]
        test_chunks_equal_a_plain_log_softmax_in_value_and_gradient[4-True-bfloat16]""",
    "test_objectives.py": """test_three_meshes_equal_one_device[mlm-data=2 test_three_meshes_equal_one_device[clm-data=2
        test_one_batch_is_learnt_by_heart""",
    "test_older_checkpoints.py": "test_it_comes_back_bit_by_bit",
    "test_training_checkpoint.py": """test_a_state_comes_back_bit_by_bit_on_any_mesh
        test_params_and_config_alone_suffice_to_use_the_model test_misfits_are_listed test_one_flipped_bit_is_found
        test_the_state_may_be_donated_while_it_is_written test_a_failed_save_is_raised_at_the_next_look""",
    "test_training_loop.py": """test_two_and_two_steps_equal_four test_a_run_goes_on_on_another_mesh
        test_the_state_is_donated test_a_signal_saves_and_leaves""",
    "test_training_optimizer.py": "test_adamw_equals_optax test_muon_equals_numpy_on_each_stacked_matrix",
    "test_training_run.py": "test_tensorboard_reads_the_same_numbers",
    "test_training_step.py": """test_loss_equals_brute_force
        test_eight_micro_batches_with_uneven_weights_equal_the_whole test_meshes_change_nothing
        test_micro_batches_are_cut_without_communication""",
}


def mark(items, root) -> None:
    """Give the collected tests of the table the marker; a file of it that lacks one of its tests is an error."""
    import pytest

    wanted = {(file, name) for file, names in CORNER.items() for name in names.split()}
    found, collected = set(), set()
    for item in items:
        file = item.path.relative_to(root).as_posix()
        collected.add(file)
        for name in {item.name, item.name.split()[0], getattr(item, "originalname", item.name)}:
            if (file, name) in wanted:
                found.add((file, name))
                item.add_marker("corner")
    # A choice of tests by their ids collects parts of files.
    lost = {(file, name) for file, name in wanted - found if file in collected}
    if lost and not any("::" in argument for argument in items[0].config.args):
        raise pytest.UsageError(f"tests/corner.py names tests that are not there: {sorted(lost)}")


if __name__ == "__main__":
    print(*(f"tests/{file}" for file in sorted(CORNER)), sep="\n")
