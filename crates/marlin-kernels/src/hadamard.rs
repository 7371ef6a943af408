//! Hadamard matrices: the rotations that spread outliers.

use crate::KernelError;

/// The most rows of a [`Core`].
pub(crate) const MOST_ORDER: usize = 36;

/// A rotation of blocks of values by an orthogonal matrix whose values are all ± 1 / √block. It is symmetric, therefore its own inverse.
///
/// The matrix is `H_m ⊗ H_2ᵏ / √block` with a block of m · 2ᵏ, m one of 1, 12, 20, 28 and 36, so that the whole width of most models is a
/// block. `H_2ᵏ` is Sylvester's matrix, whose sign at (i, j) is (−1)^(number of ones in i & j). `H_m` is Paley's (R. E. A. C. Paley, "On
/// orthogonal matrices", Journal of Mathematics and Physics 12, 1933): for 12 and 20 rows of his first construction, modulo 11 and 19, with
/// rows in an order and of signs that make it symmetric, and for 28 and 36 of his second one, modulo 13 and 17.
///
/// A linear stays what it is if both its input and the rows of its weights are rotated: `x · Wᵀ = (x · H) · (W · H)ᵀ`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hadamard {
    /// Index of `H_m` into [`CORES`].
    core: usize,
    /// 2ᵏ.
    run: usize,
}

impl Hadamard {
    /// The rotation of blocks of so many values.
    ///
    /// # Errors
    /// If it is neither a power of two nor 12, 20, 28 or 36 times one.
    pub fn new(block: usize) -> Result<Self, KernelError> {
        let found = CORES.iter().enumerate().find_map(|(core, Core { order, .. })| {
            let run = block / order;
            (block.is_multiple_of(*order) && run.is_power_of_two()).then_some(Self { core, run })
        });
        found.ok_or(KernelError::HadamardBlock { found: block })
    }

    /// The rotation of the largest blocks that rows of `width` values divide into; of single values, which it leaves as they are, if
    /// the width is odd.
    pub fn largest(width: usize) -> Self {
        let rotations = CORES.iter().enumerate().filter_map(|(core, Core { order, .. })| {
            let runs = (width > 0 && width.is_multiple_of(*order)).then_some(width / order)?;
            Some(Self { core, run: 1 << runs.trailing_zeros() })
        });
        rotations.max_by_key(Self::block).unwrap_or(Self { core: 0, run: 1 })
    }

    /// Values that are rotated together, m · 2ᵏ.
    pub fn block(&self) -> usize {
        CORES[self.core].order * self.run
    }

    /// Rotates each run of `block` values, summed in f64: what [`crate::Encoder::hadamard`] gives but for rounding. A block takes
    /// block · (k + m) additions.
    ///
    /// # Panics
    /// If they are no whole blocks.
    pub fn apply(&self, values: &mut [f32]) {
        self.check(values.len());
        let scale = 1.0 / (self.block() as f64).sqrt();
        let (mut rotated, mut sums) = (vec![0.0; self.block()], vec![0.0; self.run]);
        for block in values.chunks_exact_mut(self.block()) {
            rotated.iter_mut().zip(&*block).for_each(|(wide, &x)| *wide = f64::from(x));
            rotated.chunks_exact_mut(self.run).for_each(sylvester);
            for (signs, out) in self.signs().iter().zip(block.chunks_exact_mut(self.run)) {
                sums.fill(0.0);
                for (&sign, run) in signs.iter().zip(rotated.chunks_exact(self.run)) {
                    sums.iter_mut().zip(run).for_each(|(sum, x)| *sum += f64::from(sign) * x);
                }
                out.iter_mut().zip(&sums).for_each(|(out, sum)| *out = (sum * scale) as f32);
            }
        }
    }

    /// Index of `H_m` into [`CORES`].
    pub(crate) fn core(&self) -> usize {
        self.core
    }

    /// Values that `H_2ᵏ` is applied to, 2ᵏ.
    pub(crate) fn run(&self) -> usize {
        self.run
    }

    /// The signs of `H_m`, row by row: the first m of each of its m rows.
    pub(crate) fn signs(&self) -> &'static [[f32; MOST_ORDER]] {
        CORES[self.core].rows()
    }

    /// Holds a row's width, or a number of values, against the block.
    pub(crate) fn check(&self, width: usize) {
        let block = self.block();
        assert!(
            width.is_multiple_of(block),
            "Hadamard blocks of {block} for a width of {width}, which is no multiple of it"
        );
    }
}

/// The transform by Sylvester's matrix without its factor, by butterflies (the fast Walsh-Hadamard transform).
fn sylvester(values: &mut [f64]) {
    let mut half = 1;
    while half < values.len() {
        for pair in values.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            low.iter_mut().zip(high).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
        }
        half *= 2;
    }
}

/// `H_m`.
pub(crate) struct Core {
    order: usize,
    /// ± 1, `[order, order]` of them; 0 beyond.
    signs: [[f32; MOST_ORDER]; MOST_ORDER],
}

/// One for each m; the first is that of 1.
pub(crate) static CORES: [Core; 5] =
    [Core::one(), Core::paley_1(11), Core::paley_1(19), Core::paley_2(13), Core::paley_2(17)];

impl Core {
    /// The signs, row by row: the first `order` of each of as many rows.
    pub(crate) fn rows(&self) -> &[[f32; MOST_ORDER]] {
        &self.signs[..self.order]
    }

    const fn one() -> Self {
        let mut core = Self { order: 1, signs: [[0.0; MOST_ORDER]; MOST_ORDER] };
        core.signs[0][0] = 1.0;
        core
    }

    /// Paley's first construction, of q + 1 rows for a prime q that is 3 modulo 4.
    ///
    /// His matrix has χ(i − j) within its border and 1 on its diagonal. Here the row of i is his of −i with the other sign, which makes
    /// it symmetric: χ(i + j), −1 where i + j is 0, and a border of 1.
    const fn paley_1(q: usize) -> Self {
        let mut core = Self { order: q + 1, signs: [[0.0; MOST_ORDER]; MOST_ORDER] };
        let mut at = 0;
        while at < core.order * core.order {
            let (i, j) = (at / core.order, at % core.order);
            core.signs[i][j] = if i == 0 || j == 0 {
                1.0
            } else if (i - 1 + j - 1).is_multiple_of(q) {
                -1.0
            } else {
                character(i - 1 + j - 1, q)
            };
            at += 1;
        }
        core
    }

    /// Paley's second construction, of 2 (q + 1) rows for a prime q that is 1 modulo 4: `C ⊗ [1 1; 1 −1] + I ⊗ [1 −1; −1 −1]`, where
    /// C is 0 on its diagonal, 1 on its border and χ(i − j) within. It is symmetric, since −1 is a square.
    const fn paley_2(q: usize) -> Self {
        let mut core = Self { order: 2 * (q + 1), signs: [[0.0; MOST_ORDER]; MOST_ORDER] };
        let mut at = 0;
        while at < core.order * core.order {
            let (row, col) = (at / core.order, at % core.order);
            let (i, j, both_odd) = (row / 2, col / 2, row % 2 == 1 && col % 2 == 1);
            core.signs[row][col] = if i == j {
                if row % 2 == 0 && col % 2 == 0 { 1.0 } else { -1.0 }
            } else {
                let sign = if i == 0 || j == 0 { 1.0 } else { character(q + i - j, q) };
                if both_odd { -sign } else { sign }
            };
            at += 1;
        }
        core
    }
}

/// χ(a), the quadratic character modulo a prime that does not divide `a`: 1 if it is a square, −1 otherwise.
const fn character(a: usize, q: usize) -> f32 {
    let mut root = 1;
    while root < q {
        if root * root % q == a % q {
            return 1.0;
        }
        root += 1;
    }
    -1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Rng;

    #[test]
    fn matrices_are_symmetric_and_orthogonal() {
        for core in &CORES {
            for i in 0..core.order {
                for j in 0..core.order {
                    assert_eq!(core.signs[i][j].abs(), 1.0, "H_{} at {i}, {j}", core.order);
                    assert_eq!(core.signs[i][j], core.signs[j][i], "H_{} at {i}, {j}", core.order);
                    let dot: f32 = (0..core.order).map(|k| core.signs[i][k] * core.signs[j][k]).sum();
                    let expected = if i == j { core.order as f32 } else { 0.0 };
                    assert_eq!(dot, expected, "rows {i} and {j} of H_{}", core.order);
                }
            }
        }
    }

    #[test]
    fn matrices_are_those_of_paley() {
        let text = |core: &Core, row: usize| -> String {
            core.signs[row][..core.order].iter().map(|&sign| if sign > 0.0 { '+' } else { '-' }).collect()
        };
        // Squares modulo 11 are 1, 3, 4, 5 and 9.
        assert_eq!(text(&CORES[1], 0), "++++++++++++");
        assert_eq!(text(&CORES[1], 1), "+-+-+++---+-");
        assert_eq!(text(&CORES[1], 2), "++-+++---+--");
        // Squares modulo 13 are 1, 3, 4, 9, 10 and 12: rows 0 and 1 have the border, 2 and 3 the character.
        assert_eq!(text(&CORES[3], 0), format!("+-{}", "++".repeat(13)));
        assert_eq!(text(&CORES[3], 1), format!("--{}", "+-".repeat(13)));
        assert_eq!(text(&CORES[3], 2), "+++-++--++++--------++++--++");
        assert_eq!(text(&CORES[3], 3), "+---+--++-+--+-+-+-++-+--++-");
    }

    #[test]
    fn rotations_are_what_their_matrix_gives() {
        for block in [1, 2, 8, 12, 24, 96, 20, 80, 28, 56, 36, 144] {
            let rotation = Hadamard::new(block).unwrap();
            let core = &CORES[rotation.core];
            let x = Rng(15).normals(2 * block);
            let mut found = x.clone();
            rotation.apply(&mut found);
            for (n, found) in found.iter().enumerate() {
                let i = n % block;
                let term = |(j, &x): (usize, &f32)| {
                    let ones = ((i % rotation.run) & (j % rotation.run)).count_ones();
                    let sign = core.signs[i / rotation.run][j / rotation.run];
                    f64::from(sign) * (-1f64).powi(ones as i32) * f64::from(x)
                };
                let sum: f64 = x[n - i..][..block].iter().enumerate().map(term).sum();
                let expected = sum / (block as f64).sqrt();
                assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} at {n} of {block}, expected {expected}");
            }
            rotation.apply(&mut found);
            assert!(found.iter().zip(&x).all(|(found, x)| (found - x).abs() < 1e-5), "its own inverse: {block}");
        }
    }

    #[test]
    fn blocks_are_found() {
        for block in [1, 2, 4, 4096, 12, 768, 3072, 6144, 20, 2560, 5120, 28, 3584, 7168, 36, 2304, 4608, 9216] {
            assert_eq!(Hadamard::new(block).unwrap().block(), block);
            assert_eq!(Hadamard::largest(block).block(), block);
        }
        // 9728 = 19 · 512, 11008 = 43 · 256, 8960 = 35 · 256, 13824 = 27 · 512.
        for (width, block) in [(0, 1), (6, 2), (33, 1), (9728, 512), (11008, 256), (8960, 1792), (13824, 4608)] {
            assert_eq!(Hadamard::largest(width).block(), block, "{width}");
        }
        for block in [0, 3, 6, 10, 14, 18, 44, 60, 9728, usize::MAX] {
            let error = Hadamard::new(block).unwrap_err().to_string();
            assert!(error.contains(&format!("found {block}")) && error.contains("12, 20, 28 or 36"), "{error}");
        }
    }

    #[test]
    #[should_panic(expected = "blocks of 12 for a width of 18")]
    fn broken_blocks_are_refused() {
        Hadamard::new(12).unwrap().apply(&mut [0.0; 18]);
    }
}
