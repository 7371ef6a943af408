// Positions of a split of a token that sees so many: at least LEAST_SPLIT, and a multiple of it, so that splits are no more than 2 to the power of
// `most_splits`. It depends on the token alone, whatever else is in the step.
fn positions_of_split(seen: u32) -> u32 {
    let share = ((seen - 1u) >> params.most_splits) / LEAST_SPLIT * LEAST_SPLIT + LEAST_SPLIT;
    return select(share, ONE_SPLIT, seen <= ONE_SPLIT);
}
